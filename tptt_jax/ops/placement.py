"""Activations on a mesh: constraints that XLA's partitioner has to keep."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tptt_jax.array_typing import Array
from tptt_jax.ops.context import CONTEXT_AXIS, ROW_AXES

MeshAxes = str | tuple[str, ...]
"""One axis of a mesh, or several that divide an axis of an array together."""


class ActivationRules(NamedTuple):
    """The mesh that divides activations, and its axes by the names of theirs."""

    mesh: Mesh
    rules: tuple[tuple[str, MeshAxes], ...]

    @classmethod
    def of(cls, mesh: Mesh, rules: Mapping[str, str]) -> "ActivationRules":
        """The rules of parameters, and those of rows and tokens where the mesh has their axes."""
        found: dict[str, MeshAxes] = dict(rules)
        if rows := tuple(name for name in ROW_AXES if name in mesh.shape):
            found["rows"] = rows
        if CONTEXT_AXIS in mesh.shape:
            found["tokens"] = CONTEXT_AXIS
        return cls(mesh, tuple(sorted(found.items())))

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The mesh axes that divide each axis of an array."""
        return PartitionSpec(*assign_axes(names, shape, self.mesh.shape, dict(self.rules)))


# Part of the keys by which jax.jit finds compiled programs.
activation_rules = jax.make_user_context(None)


def constrain(x: Array, *names: str | None) -> Array:
    """An array whose axes are divided as `tptt_jax.sharding.on_mesh` says.

    Outside of `on_mesh`, and where arrays are divided by hand (`jax.shard_map`), it is x itself.

    Args:
      x: the array.
      names: one for each axis: "rows", "tokens", or an axis of a parameter such as "heads"; None:
        every device has the whole axis. An axis that the mesh does not divide evenly stays whole;
        rows and tokens are left to XLA if the mesh has no axes for them.
    """
    active = active_rules()
    if active is None:
        return x
    rules = dict(active.rules)
    spec = [
        PartitionSpec.UNCONSTRAINED if name in ("rows", "tokens") and name not in rules else axes
        for name, axes in zip(names, active.spec(names, x.shape), strict=True)
    ]
    return lax.with_sharding_constraint(x, NamedSharding(active.mesh, PartitionSpec(*spec)))


def active_rules() -> ActivationRules | None:
    """The rules of `on_mesh`; None outside of it, and where arrays are divided by hand."""
    rules = activation_rules.value
    return None if jax.sharding.get_abstract_mesh().manual_axes else rules


def constrain_lookup(x: Array) -> Array:
    """Hidden states [B, T, E] from the rows of a table [V, E].

    Where fsdp divides the width of the table and the rows of the batch, XLA would replicate them to
    get from the one to the other, and says so. It exchanges parts if it is told of both.
    """
    active = active_rules()
    if active is not None:
        free, (width,) = PartitionSpec.UNCONSTRAINED, active.spec(("embed",), x.shape[2:])
        divided = NamedSharding(active.mesh, PartitionSpec(free, free, width))
        x = lax.with_sharding_constraint(x, divided)
    return constrain(x, "rows", "tokens", None)


def assign_axes(
    names: Sequence[str | None],
    parts: Sequence[int],
    sizes: Mapping[str, int],
    rules: Mapping[str, MeshAxes],
) -> list[MeshAxes | None]:
    """The mesh axes of each axis of an array; None: it stays whole.

    Args:
      names: of the axes; None: no rule holds for one.
      parts: what may be divided on each axis; the mesh has to divide it evenly.
      sizes: of the mesh's axes.
      rules: from names to axes of the mesh, of which each divides the first axis that wants it.
    """
    taken: set[str] = set()
    found: list[MeshAxes | None] = []
    for name, count in zip(names, parts, strict=True):
        wanted = None if name is None else rules.get(name)
        axes = (wanted,) if isinstance(wanted, str) else wanted or ()
        if taken.intersection(axes) or count % math.prod(sizes[axis] for axis in axes):
            wanted, axes = None, ()
        found.append(wanted)
        taken.update(axes)
    return found
