"""Arrays inside of `jax.shard_map`, which checks along which mesh axes they vary."""

from typing import Any

import jax

from tptt_jax.array_typing import Array


def varying_axes(*arrays: Array | None) -> frozenset[str]:
    """Mesh axes along which some of these arrays vary; none outside of a checked `shard_map`."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        if array is not None:
            kind: Any = jax.typeof(array)
            # `vma` until jax 0.9.
            manual = getattr(kind, "manual_axis_type", None)
            axes |= getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    return axes


def vary_along(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, declared to vary along these mesh axes too.

    Loops need this: their initial values must have the type of their carry.
    """

    def cast(array: Array) -> Array:
        missing = axes - varying_axes(array)
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(cast, tree) if axes else tree
