import jax.numpy as jnp
import numpy as np
import pytest

from tptt_jax.training.optimizer import OptimizerConfig
from tptt_jax.training.schedules import MagSchedule, learning_rate_schedule


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"kind": "constant", "end": 0.3}, [0.3] * 5),
        ({"kind": "gradual", "start": 0.0, "end": 0.4, "steps": 4}, [0, 0.1, 0.2, 0.3, 0.4]),
        ({"kind": "cyclic", "values": (0.1, 0.2, 0.3)}, [0.1, 0.2, 0.3, 0.1, 0.2]),
        ({"kind": "switch", "end": 0.5, "period": 2}, [0, 0, 0.5, 0.5, 0]),
    ],
    ids=lambda x: x["kind"] if isinstance(x, dict) else "",
)
def test_share_by_step(options, want):
    schedule = MagSchedule(**options)
    got = [float(schedule(jnp.asarray(step))) for step in range(5)]
    np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"end": 1.5}, {"start": -0.1}, {"steps": 0}, {"period": 0}, {"kind": "jump"}]
)
def test_impossible_schedules_are_refused(options):
    with pytest.raises(ValueError, match=r"must|needs"):
        MagSchedule(**options)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rate_rises_then_falls(kind):
    schedule = learning_rate_schedule(kind, 1.0, 100, warmup_steps=10)
    rates = np.array([float(schedule(step)) for step in range(101)])
    assert 0 < rates[0] < rates[5] < rates[10] == 1.0
    assert np.all(np.diff(rates[10:]) <= 1e-9)
    np.testing.assert_allclose(rates[-1], 1.0 if kind == "constant" else 0.1, atol=1e-6)


@pytest.mark.parametrize(("ratio", "rise"), [(0.0, 0), (0.05, 5), (0.101, 11), (1.0, 100)])
def test_a_warm_up_may_be_a_share_of_the_steps(ratio, rise):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=7, warmup_ratio=ratio)
    expected = learning_rate_schedule(config.lr_schedule, 1.0, 100, rise)
    for step in (0, 4, 5, 11, 50, 99):
        assert float(config.schedule(100)(step)) == float(expected(step))
    with pytest.raises(ValueError, match=r"warmup_ratio must lie in \[0, 1\], got 3"):
        OptimizerConfig(warmup_ratio=3)
