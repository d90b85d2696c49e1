"""Context parallelism: the tokens of a row divided among the devices of a mesh axis.

The model is one program over whole rows, which XLA divides by itself wherever tokens are
independent. `split_tokens` runs the rest on each device's own tokens; it fetches what it needs from
other devices.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from tptt_jax.array_typing import Array, Int, Shaped

CONTEXT_AXIS = "context"
# Axes of the mesh that divide the rows of a batch, and heads.
ROW_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"


def num_shards() -> int:
    """Parts of a row: the size of the mesh's context axis under `jax.set_mesh`, else 1.

    Also 1 where tokens are split already: inside of `split_tokens`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if CONTEXT_AXIS not in mesh.axis_names or CONTEXT_AXIS in mesh.manual_axes:
        return 1
    return mesh.shape[CONTEXT_AXIS]


def is_split(tokens: int) -> bool:
    """Whether rows of this many tokens are divided among devices."""
    return num_shards() > 1 and tokens % num_shards() == 0


def split_tokens(
    run: Callable[..., Any],
    split: tuple[Any, ...],
    whole: tuple[Any, ...] = (),
    *,
    has_heads: bool = True,
) -> Any:
    """Runs ``run(*split, *whole)`` on each device's tokens, rows and heads.

    All axes of the mesh are divided by hand: XLA fails on some gathers if others are left to it.

    Args:
      run: a function of trees of arrays; its results have the axes [B, T, heads, ...].
      split: trees of arrays [B, T, heads, ...] or [B, T], T divisible by the number of shards.
      whole: trees of arrays [B, T], which every device of the context axis gets whole, or scalars.
      has_heads: False: no array has heads on its third axis.

    Returns:
      The results for whole rows.
    """
    mesh, arrays = jax.sharding.get_abstract_mesh().shape, jax.tree.leaves(split)
    rows = tuple(name for name in ROW_AXES if name in mesh)
    if arrays[0].shape[0] % math.prod(mesh[name] for name in rows):
        rows = ()
    third = [x.shape[2] for x in arrays if x.ndim > 2]
    # Query heads must stay with their KV heads.
    heads = has_heads and HEAD_AXIS in mesh and not any(x % mesh[HEAD_AXIS] for x in third)
    axes = (rows, CONTEXT_AXIS, HEAD_AXIS) if heads else (rows, CONTEXT_AXIS)
    return jax.shard_map(
        run,
        in_specs=(
            *jax.tree.map(lambda x: PartitionSpec(*axes[: x.ndim]), split),
            *jax.tree.map(lambda x: PartitionSpec(*axes[: min(x.ndim, 1)]), whole),
        ),
        out_specs=PartitionSpec(*axes),
        # Kernels do not declare along which axes their results vary.
        check_vma=False,
    )(*split, *whole)


def shards_as_rows(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "R t ..."]:
    """Rows that are divided among devices as rows of one shard each; others as they are.

    For loops over tokens that are independent of one another. The first shards of all rows come
    first: in this order no token changes its device.
    """
    if not is_split(x.shape[1]):
        return x
    parts = x.reshape(x.shape[0], num_shards(), -1, *x.shape[2:])
    return jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])


def rows_as_shards(x: Shaped[Array, "R t ..."], rows: int) -> Shaped[Array, "B T ..."]:
    """Inverse of `shards_as_rows`, with this many rows."""
    parts = x.reshape(-1, rows, *x.shape[1:])
    return jnp.swapaxes(parts, 0, 1).reshape(rows, -1, *x.shape[2:])


def running_max(x: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """`lax.cummax` along rows; one number of each shard goes to the other devices."""
    if not is_split(x.shape[1]):
        return lax.cummax(x, axis=1)
    parts = lax.cummax(x.reshape(x.shape[0], num_shards(), -1), axis=2)
    before = lax.cummax(parts[:, :-1, -1:], axis=1)
    joined = [parts[:, :1], jnp.maximum(parts[:, 1:], before)]
    return jnp.concatenate(joined, axis=1).reshape(x.shape)


def from_shard_before(tree: Any, hops: int = 1) -> Any:
    """Arrays of the shard `hops` before this one, inside `split_tokens`; zeros if there is none."""
    pairs = [(i, i + hops) for i in range(lax.axis_size(CONTEXT_AXIS) - hops)]
    return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT_AXIS, pairs), tree)


def with_tokens_before(x: Shaped[Array, "B t ..."], count: int) -> Shaped[Array, "B c+t ..."]:
    """A shard with the `count` tokens before it, inside of `split_tokens`; zeros before the row.

    They may come from several shards.
    """
    size, parts, missing = x.shape[1], [x], count
    for hops in range(1, lax.axis_size(CONTEXT_AXIS)):
        if missing <= 0:
            break
        parts.insert(0, from_shard_before(x[:, max(size - missing, 0) :], hops))
        missing -= size
    before_row = ((0, 0), (max(missing, 0), 0), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(jnp.concatenate(parts, axis=1), before_row)


def with_whole_row(x: Shaped[Array, "B t ..."]) -> Shaped[Array, "B T ..."]:
    """A shard after all earlier ones, inside `split_tokens`; zeros in front, T tokens in all."""
    every, shards = lax.all_gather(x, CONTEXT_AXIS), lax.axis_size(CONTEXT_AXIS)
    shift = lax.axis_index(CONTEXT_AXIS) + 1 - shards
    order = (shift + jnp.arange(shards)).reshape(-1, *(1,) * x.ndim)
    parts = jnp.where(order < 0, 0, jnp.roll(every, -shift, axis=0))
    return jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])


def take_split_tokens(
    x: Shaped[Array, "B T ..."], source: Int[Array, "B T"], steps: int = 0
) -> Shaped[Array, "B T ..."]:
    """x[b, source[b, t]] for rows that are divided among devices.

    In the usual case, where every source is t - `steps` or t (what is taken there is then
    arbitrary), each device fetches `steps` tokens. Else the shards go round all devices, so that
    none ever holds the whole row.

    Args:
      x: one value per token [B, T, ...].
      source: places [B, T].
      steps: of the usual case.
    """
    places = jnp.arange(source.shape[1])
    is_usual = jnp.all((source == places - steps) | (source == places))

    def shift(x: Array, source: Array) -> Array:
        del source
        return with_tokens_before(x, steps)[:, : x.shape[1]]

    def split(run: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *args: split_tokens(run, args, has_heads=x.ndim > 3)

    return lax.cond(is_usual, split(shift), split(_rotate_gather), x, source)


def _rotate_gather(x: Array, source: Array) -> Array:
    """Takes tokens from one shard after the other while they pass by."""
    size, shards = x.shape[1], lax.axis_size(CONTEXT_AXIS)
    ring = [(i, (i + 1) % shards) for i in range(shards)]

    def visit(carry: tuple[Array, Array], hops: Array) -> tuple[tuple[Array, Array], None]:
        passing, taken = carry
        owner = (lax.axis_index(CONTEXT_AXIS) - hops) % shards
        shape = (*source.shape, *(1,) * (x.ndim - 2))
        index = jnp.clip(source - owner * size, 0, size - 1).reshape(shape)
        is_here = (source // size == owner).reshape(shape)
        taken = jnp.where(is_here, jnp.take_along_axis(passing, index, axis=1), taken)
        return (lax.ppermute(passing, CONTEXT_AXIS, ring), taken), None

    return lax.scan(visit, (x, jnp.zeros_like(x)), jnp.arange(shards))[0][1]
