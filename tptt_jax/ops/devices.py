"""The device that a computation runs on, as far as it is known while it is traced."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.core import Tracer

T = TypeVar("T")


class PerPlatform(NamedTuple):
    """A setting with one value for CPUs and one for everything else."""

    cpu: Any
    other: Any


def run_per_platform(run: Callable[..., T], setting: PerPlatform, *arrays: Any) -> T:
    """run(value, *arrays) with the value for the platform that the program is compiled for.

    A traced function is compiled with one of the two only. Not for what is differentiated: the
    gradient would keep intermediates of both.

    Args:
      run: traced once for each value if they differ.
      setting: the values.
      arrays: further arguments, or trees of them.
    """
    if setting.cpu == setting.other:
        return run(setting.cpu, *arrays)
    device = _device_of(arrays)
    if device is not None:
        return run(setting.cpu if device.platform == "cpu" else setting.other, *arrays)

    def with_value(value: Any) -> Callable[..., T]:
        return lambda *arrays: run(value, *arrays)

    return lax.platform_dependent(
        *arrays, cpu=with_value(setting.cpu), default=with_value(setting.other)
    )


def platform_of(*arrays: Any) -> str:
    """The platform of a computation on these arrays: "cpu", "gpu" or "tpu".

    Arrays outside of a trace know their device. While a function is traced its arguments have none,
    and the same trace serves all devices: the default device counts then (`jax.default_device`,
    else that of the default backend). Where a choice can wait until the program is compiled,
    `jax.lax.platform_dependent` makes it for the right device.

    Args:
      arrays: arguments of the computation; None and arrays without a device do not count.
    """
    device = _known_device(arrays)
    if device is not None:
        name = device if isinstance(device, str) else device.platform
        return "gpu" if name in ("cuda", "rocm") else name
    return jax.default_backend()


def compute_capability(*arrays: Any) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, e.g. (9, 0) for Hopper; None on anything else.

    Args:
      arrays: what runs there, see `platform_of`; without any: of the first GPU.
    """
    if platform_of(*arrays) != "gpu":
        return None
    device = _known_device(arrays)
    if device is None or isinstance(device, str):
        device = jax.local_devices()[0]
    # Such as 9.0; AMD's have names such as gfx90a.
    capability = str(getattr(device, "compute_capability", ""))
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return None if match is None else (int(match[1]), int(match[2]))


def _known_device(arrays: tuple[Any, ...]) -> Any:
    """A device, or the name of a platform; None: nothing but the backend decides."""
    device = _device_of(arrays)
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return chosen if device is None else device


def _device_of(arrays: tuple[Any, ...]) -> Any:
    """The device of the first array that has one, or None."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, Tracer):
            return min(x.devices(), key=lambda device: device.id)
    return None
