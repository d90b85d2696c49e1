"""Sharding over a mesh: one table from logical axes of parameters to mesh axes; batches."""

import contextlib
import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tptt_jax.ops.context import CONTEXT_AXIS
from tptt_jax.processes import put

# The last axes connect neighbouring devices: they carry the most bytes.
MESH_AXES = ("data", "fsdp", CONTEXT_AXIS, "tensor")

# Logical axis of a parameter -> mesh axis. Other axes are replicated.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(layout: str) -> Mesh:
    """A mesh with the axes data, fsdp, context and tensor over the first devices.

    Args:
      layout: such as "data=2,fsdp=2,tensor=2" or "context=4"; an axis that is left out has size 1.

    Returns:
      A mesh that has all four axes.

    Raises:
      ValueError: if the layout is invalid or needs more devices than available.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, layout.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"mesh must look like data=2,fsdp=2,tensor=2 or context=4 with sizes of at least "
                f"1, got {layout!r}."
            )
        sizes[name] = int(size)
    needed = math.prod(sizes.values())
    devices = jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"mesh {layout!r} needs {needed} devices, there are {len(devices)}: use smaller sizes."
        )
    return Mesh(np.array(devices[:needed]).reshape(tuple(sizes.values())), MESH_AXES)


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of a parameter with these logical axes.

    Args:
      axes: one name per trailing axis; leading axes without a name (stacked
        layers) are replicated.
      shape: an axis that the mesh does not divide evenly is replicated.
      mesh: from `make_mesh`.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(RULES.get(axis) for axis in axes)
    fits = [
        name if name is not None and size % mesh.shape[name] == 0 else None
        for name, size in zip(names, shape, strict=True)
    ]
    return PartitionSpec(*fits)


def sharding_of(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter, from its `axes` metadata and RULES."""
    axes = variable.get_metadata().get("axes", ())
    return NamedSharding(mesh, partition_spec(axes, variable.get_value().shape, mesh))


def batch_sharding(mesh: Mesh, *, divide_rows: bool = True) -> NamedSharding:
    """Of arrays [B, T]: rows go to data and fsdp together, tokens to context.

    Args:
      mesh: from `make_mesh`.
      divide_rows: False keeps rows together, where they do not divide evenly.
    """
    rows = ("data", "fsdp") if divide_rows else None
    return NamedSharding(mesh, PartitionSpec(rows, CONTEXT_AXIS))


def own_rows(mesh: Mesh, count: int) -> slice:
    """The rows of arrays [count, T] on a mesh that this process's devices hold: neighbours.

    Args:
      mesh: from `make_mesh`; its data and fsdp axes divide `count`.
      count: rows over all devices.
    """
    sharding = batch_sharding(mesh)
    shape = (count, mesh.shape[CONTEXT_AXIS])
    found = sharding.addressable_devices_indices_map(shape).values()
    parts = [index[0].indices(count) for index in found if index is not None]
    return slice(min(part[0] for part in parts), max(part[1] for part in parts))


def divided_rows(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """The context manager in which models divide the tokens of rows along the context axis.

    Elsewhere results are the same, but XLA gathers whole rows on each device. It has no effect
    without a mesh, or where the context axis has one device.
    """
    if mesh is None or mesh.shape[CONTEXT_AXIS] == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def undivided_rows() -> contextlib.AbstractContextManager[object]:
    """The context manager in which models leave rows whole, also inside `divided_rows`."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_model(model: nnx.Module, mesh: Mesh) -> None:
    """Moves every variable of a model to its place on the mesh."""
    state = nnx.state(model)
    placed = jax.tree.map(
        lambda variable: variable.replace(put(variable.get_value(), sharding_of(variable, mesh))),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    nnx.update(model, placed)
