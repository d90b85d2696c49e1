"""Settings of tests on generated inputs."""

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """So many examples, the same in every run and without a time limit for each."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
