"""Partitions the kernels over devices: every device runs its rows and its KV heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from tptt_jax.array_typing import Array
from tptt_jax.ops.delta_product.kernels.backward import run_backward
from tptt_jax.ops.delta_product.kernels.calls import KernelInputs
from tptt_jax.ops.delta_product.kernels.forward import run_forward
from tptt_jax.ops.delta_product.kernels.tiles import Cut

# Axes of the inputs; only rows (b) and KV heads (k) may be divided. Query heads are those of the
# KV heads one after the other.
_AXES = {
    "q": "b t (k g) d",
    "k": "b v k d",
    "v": "b v k e",
    "beta": "b k v",
    "beta per channel": "b v k d",
    "state": "b k d e",
    "log_decay": "b k t",
    "ordinals": "b t",
}
_OUT, _LAST = "b t (k g) e", _AXES["state"]


def forward(inputs: KernelInputs, cut: Cut) -> tuple[Array, Array]:
    """`run_forward` on all devices."""
    if _is_local():
        return run_forward(inputs, cut)
    return _divide(lambda x: run_forward(x, cut), (inputs,), (_OUT, _LAST), inputs)


def backward(inputs: KernelInputs, grad_out: Array, grad_last: Array, cut: Cut) -> KernelInputs:
    """`run_backward` on all devices."""
    if _is_local():
        return run_backward(inputs, grad_out, grad_last, cut)
    results = inputs._replace(ordinals=None)
    return _divide(
        lambda x, out, last: run_backward(x, out, last, cut),
        (inputs, grad_out, grad_last),
        _name_axes(results),
        inputs,
    )


def _is_local() -> bool:
    """Whether arrays are local: there is one device, or `jax.shard_map` has divided them."""
    mesh = jax.sharding.get_abstract_mesh()
    is_divided = not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() == 1 or is_divided


def _name_axes(inputs: KernelInputs) -> KernelInputs:
    """The axes of every present array."""
    names = _AXES | {"beta": _AXES["beta per channel" if inputs.beta.ndim == 4 else "beta"]}
    present: dict[str, Any] = {
        key: None if array is None else names[key] for key, array in inputs._asdict().items()
    }
    return KernelInputs(**present)


def _divide(run: Callable[..., Any], args: Any, results: Any, inputs: KernelInputs) -> Any:
    """Runs a function of trees whose arrays have named axes on each device's part."""
    kv_heads = inputs.k.shape[2]
    group = inputs.q.shape[2] // kv_heads
    axes = (_name_axes(inputs), _OUT, _LAST)[: len(args)]
    if group == 1 or kv_heads == 1:
        # An axis may be made of several only if none of them has the size 1.
        heads = "k" if group == 1 else "g"
        axes, results = jax.tree.map(lambda x: x.replace("(k g)", heads), (axes, results))
    arrays, structure = jax.tree.flatten(args)
    names, (result_names, result_structure) = jax.tree.leaves(axes), jax.tree.flatten(results)

    def run_flat(*flat: Array) -> tuple[Array, ...]:
        return tuple(jax.tree.leaves(run(*jax.tree.unflatten(structure, flat))))

    divided = custom_partitioning(run_flat)

    def partition(mesh: Any, shapes: Any, result_shapes: Any) -> Any:
        del result_shapes
        # Rows as q has them, heads as k has them: those divide the heads of q as well.
        owners = {"b": _spec(shapes[0])[0], "k": _spec(shapes[1])[2]}

        def place(named: str) -> NamedSharding:
            letters = named.replace("(k g)", "k").split()
            return NamedSharding(mesh, PartitionSpec(*(owners.get(x) for x in letters)))

        sources, targets = tuple(map(place, names)), tuple(map(place, result_names))
        return mesh, run_flat, targets, sources

    # In the order in which q, k and v name them.
    sizes: dict[str, Any] = {"g": group} if group > 1 and kv_heads > 1 else {}
    whole = [x for x in ("t", "g", "d", "v", "e") if x != "g" or group > 1]
    divided.def_partition(
        partition,
        sharding_rule=f"{', '.join(names)} -> {', '.join(result_names)}",
        need_replication_factors=tuple(whole),
        **sizes,
    )
    return jax.tree.unflatten(result_structure, _fold_vmapped(divided)(*arrays))


def _fold_vmapped(run: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """The same under `jax.vmap`, whose axis is folded into the rows, the first axis of all arrays.

    Partitioned functions have no batching rule of their own.
    """
    folded = custom_vmap(run)

    @folded.def_vmap
    def map_rows(size: int, is_mapped: list[bool], *flat: Array) -> tuple[Any, Any]:
        whole = (
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(flat, is_mapped, strict=True)
        )
        results = folded(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        apart = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return apart, (True,) * len(apart)

    return folded


def _spec(shape: Any) -> tuple[Any, ...]:
    """The mesh axes that divide each axis."""
    given = tuple(shape.sharding.spec)
    return given + (None,) * (len(shape.shape) - len(given))
