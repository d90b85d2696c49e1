"""What a result was computed with."""

import platform

import jax

from tptt_jax.version import __version__


def describe_environment() -> str:
    """Versions, device and system in one line."""
    return (
        f"tptt_jax {__version__}, Python {platform.python_version()}, jax {jax.__version__} on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.platform()}"
    )
