"""Sharding over a mesh: one table from logical axes of parameters to mesh axes; batches."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tptt_jax.layers.parameters import JoinedHeads
from tptt_jax.ops.context import CONTEXT_AXIS
from tptt_jax.ops.placement import ActivationRules, activation_rules, assign_axes
from tptt_jax.processes import put

# The last axes connect neighbouring devices: they carry the most bytes.
MESH_AXES = ("data", "fsdp", CONTEXT_AXIS, "tensor")

# Logical axis of a parameter to mesh axis; rules of your own may replace them. Other axes are
# replicated, such as "experts".
RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
# Axes of parameters that rules may name; those of norms and adapters are short.
PARAMETER_AXES = (*RULES, "experts")


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


def make_rules(changes: Iterable[str]) -> dict[str, str]:
    """`RULES` with changes.

    Args:
      changes: such as "experts=tensor", an axis of parameters and one of `make_mesh`, or
        "embed=none", which leaves an axis whole.

    Raises:
      ValueError: if a change cannot be read, or names an unknown axis.
    """
    rules = dict(RULES)
    for change in changes:
        name, _, axis = change.partition("=")
        if name not in PARAMETER_AXES or axis not in (*MESH_AXES, "none"):
            raise ValueError(
                "a rule of the mesh must look like experts=tensor, with one of "
                f"{', '.join(PARAMETER_AXES)} before the sign and one of {', '.join(MESH_AXES)} or "
                f"none after it, got {change!r}."
            )
        rules[name] = axis
    return {name: axis for name, axis in rules.items() if axis != "none"}


def partition_spec(
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Mapping[str, str] = RULES,
) -> PartitionSpec:
    """The spec of a parameter with these logical axes.

    Args:
      axes: one name per trailing axis; leading axes without a name (stacked
        layers) are replicated.
      shape: an axis that the mesh does not divide evenly is replicated, so are channels of heads
        (`JoinedHeads`) if it does not divide the number of heads.
      mesh: from `make_mesh`, or with axes of your own.
      rules: from logical axes to mesh axes. If two axes of a parameter go to the same mesh axis,
        the first one gets it.

    Raises:
      ValueError: if a rule names an axis that the mesh lacks.
    """
    unknown = sorted(set(rules.values()) - set(mesh.axis_names))
    if unknown:
        raise ValueError(
            f"the rules name the mesh axis {unknown[0]!r}, the mesh has "
            f"{', '.join(mesh.axis_names)}: use one of these, or leave the rule out."
        )
    unnamed = len(shape) - len(axes)
    # Of quantised weights the axis of heads has blocks, fewer than channels: both have to divide.
    parts = [
        math.gcd(axis.heads, size) if isinstance(axis, JoinedHeads) else size
        for axis, size in zip(axes, shape[unnamed:], strict=True)
    ]
    return PartitionSpec(*(None,) * unnamed, *assign_axes(axes, parts, mesh.shape, rules))


def sharding_of(
    variable: nnx.Variable, mesh: Mesh, rules: Mapping[str, str] = RULES
) -> NamedSharding:
    """The sharding of a parameter, from its `axes` metadata; see `partition_spec`."""
    axes = variable.get_metadata().get("axes", ())
    return NamedSharding(mesh, partition_spec(axes, variable.get_value().shape, mesh, rules))


def name_axes(state: nnx.State, mesh: Mesh, rules: Mapping[str, str] = RULES) -> nnx.State:
    """The same variables with the metadata that Flax's own functions read.

    `nnx.get_partition_spec` and `nnx.get_named_sharding` then return what `shard_model` uses.

    Args:
      state: of a model, abstract or not; it is not changed.
      mesh: from `make_mesh`, or with axes of your own.
      rules: from logical axes to mesh axes.
    """

    def named(variable: nnx.Variable) -> nnx.Variable:
        # A copy's metadata, as Flax places values by it when it makes variables inside of a mesh.
        copy = variable.copy()
        copy.set_metadata(out_sharding=tuple(sharding_of(variable, mesh, rules).spec))
        return copy

    return jax.tree.map(named, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def batch_sharding(mesh: Mesh, *, divide_rows: bool = True) -> NamedSharding:
    """Of arrays [B, T]: rows go to data and fsdp together, tokens to context.

    Args:
      mesh: from `make_mesh`.
      divide_rows: False keeps rows together, where they do not divide evenly.
    """
    rows = ("data", "fsdp") if divide_rows else None
    return NamedSharding(mesh, PartitionSpec(rows, CONTEXT_AXIS))


def own_rows(mesh: Mesh, count: int) -> slice:
    """The contiguous rows of arrays [count, T] that this process's devices hold.

    Args:
      mesh: from `make_mesh`; its data and fsdp axes divide `count`.
      count: rows over all devices.
    """
    sharding = batch_sharding(mesh)
    shape = (count, mesh.shape[CONTEXT_AXIS])
    found = sharding.addressable_devices_indices_map(shape).values()
    parts = [index[0].indices(count) for index in found if index is not None]
    return slice(min(part[0] for part in parts), max(part[1] for part in parts))


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None, rules: Mapping[str, str] = RULES) -> Iterator[None]:
    """The context manager in which models divide their activations over a mesh.

    Rows go to data and fsdp, tokens to context, heads, the width of the MLP and logits to where
    `rules` put those axes of parameters. Elsewhere results are the same, but XLA alone decides what
    each device holds, and gathers whole rows where a mesh has a context axis. It has no effect
    without a mesh.

    Args:
      mesh: that the model and its inputs are on.
      rules: those of `shard_model`.
    """
    if mesh is None:
        yield
        return
    # Other devices may then be needed to compute what no array says: only where rows are divided.
    is_ambient = mesh.shape.get(CONTEXT_AXIS, 1) > 1
    with (
        jax.set_mesh(mesh) if is_ambient else contextlib.nullcontext(),
        activation_rules(ActivationRules.of(mesh, rules)),
    ):
        yield


@contextlib.contextmanager
def off_mesh() -> Iterator[None]:
    """The context manager in which activations stay undivided, also inside `on_mesh`."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), activation_rules(None):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_model(model: nnx.Module, mesh: Mesh, rules: Mapping[str, str] = RULES) -> None:
    """Moves every variable of a model to its place on the mesh.

    Args:
      model: its arrays are replaced.
      mesh: from `make_mesh`, or with axes of your own.
      rules: from logical axes to mesh axes.
    """
    state = nnx.state(model)
    placed = jax.tree.map(
        lambda variable: variable.replace(
            put(variable.get_value(), sharding_of(variable, mesh, rules))
        ),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    nnx.update(model, placed)
