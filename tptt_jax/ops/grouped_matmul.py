"""Products of groups of rows with one matrix each, for mixtures of experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.ops.quantization import QuantizedArray, Weight, dense, take_entry
from tptt_jax.ops.residuals import save_product


class Grouping(NamedTuple):
    """A layout of rows in which every block of rows belongs to one group.

    Attributes:
      slots: slot of each row [M]; some slots of a block may stay empty.
      groups: the group of each block [blocks].
      num_slots: blocks times rows per block.
      used: number of blocks to multiply, the first ones; None: all.
    """

    slots: Int[Array, "M"]
    groups: Int[Array, "blocks"]
    num_slots: int
    used: Int[Array, ""] | None = None


class OwnGroups(NamedTuple):
    """The consecutive groups whose matrices are available.

    Attributes:
      first: number of the first one.
      size: how many, static.
    """

    first: Int[Array, ""]
    size: int


def group_rows(
    group_of_row: Int[Array, "M"], num_groups: int, own: OwnGroups | None = None
) -> Grouping:
    """Sorts rows into blocks of one group each, without dropping any.

    Args:
      group_of_row: [M], in [0, num_groups).
      num_groups: static.
      own: groups that are multiplied; rows of the others become zero. None: all.

    Returns:
      The layout. Every group fills whole blocks; there are at most M / block + min(M,
      num_groups) of them, all counted whether they are used or not.
    """
    rows = group_of_row.shape[0]
    block = _block_rows(rows, num_groups)
    if own is not None:
        # One group more for all rows of others, behind the rest.
        group_of_row = group_of_row - own.first
        is_own = (group_of_row >= 0) & (group_of_row < own.size)
        group_of_row, num_groups = jnp.where(is_own, group_of_row, own.size), own.size + 1
    num_blocks = rows // block + min(rows, num_groups)
    sizes = jnp.zeros(num_groups, jnp.int32).at[group_of_row].add(1)
    blocks = -(-sizes // block)
    last_block = jnp.cumsum(blocks)
    order = jnp.argsort(group_of_row, stable=True)
    rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
    in_group = rank - (jnp.cumsum(sizes) - sizes)[group_of_row]
    slots = (last_block - blocks)[group_of_row] * block + in_group
    # Blocks past the last one multiply zeros by some matrix.
    groups = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    groups = jnp.minimum(groups, num_groups - 1).astype(jnp.int32)
    used = None if own is None else last_block[own.size - 1]
    return Grouping(slots, groups, num_blocks * block, used)


def grouped_matmul(
    x: Float[Array, "M I"], weights: Float[Array, "X I O"] | QuantizedArray, grouping: Grouping
) -> Float[Array, "M O"]:
    """Multiplies every row with the matrix of its group, reading each matrix about once.

    The work is that of the rows, rounded up to blocks: not of all rows with all matrices, as
    `jax.lax.ragged_dot` does on CPU.

    Args:
      x: rows [M, I].
      weights: a matrix per group [X, I, O]; quantised ones are made dense one at a time.
      grouping: from `group_rows`; several products may share it.

    Returns:
      [M, O] in x's dtype.
    """
    blocks = jnp.zeros((grouping.num_slots, x.shape[1]), x.dtype).at[grouping.slots].set(x)
    blocks = blocks.reshape(grouping.groups.shape[0], -1, x.shape[1])
    if not isinstance(weights, QuantizedArray):
        weights = weights.astype(x.dtype)
    out = _multiply_blocks(blocks, weights, grouping.groups, grouping.used)
    return save_product(out.reshape(grouping.num_slots, -1)[grouping.slots])


def _block_rows(rows: int, num_groups: int) -> int:
    """About the rows that a group has, a power of two: larger wastes work, smaller matrices."""
    block = 1
    while block < 128 and block * num_groups < rows:
        block *= 2
    return block


@jax.custom_vjp
def _multiply_blocks(x: Array, weights: Weight, groups: Array, used: Array | None) -> Array:
    """[blocks, rows, I] x [X, I, O] -> [blocks, rows, O]; zero from block `used` on."""

    def multiply(each: tuple[Array, Array]) -> Array:
        return each[0] @ dense(take_entry(weights, each[1]), x.dtype)

    return _map_blocks(multiply, (x, groups), used)


def _map_blocks(run: Callable[[Any], Array], blocks: Any, used: Array | None) -> Array:
    """`lax.map` over the first `used` blocks; zeros for the others."""
    if used is None:
        return lax.map(run, blocks)
    shape = jax.eval_shape(run, take_entry(blocks, jnp.zeros((), jnp.int32)))

    def visit(number: Array, out: Array) -> Array:
        done = run(take_entry(blocks, number))
        return lax.dynamic_update_index_in_dim(out, done, number, axis=0)

    count = jax.tree.leaves(blocks)[0].shape[0]
    return lax.fori_loop(0, used, visit, jnp.zeros((count, *shape.shape), shape.dtype))


def _multiply_forward(
    x: Array, weights: Weight, groups: Array, used: Array | None
) -> tuple[Array, tuple]:
    return _multiply_blocks(x, weights, groups, used), (x, weights, groups, used)


def _multiply_backward(
    residuals: tuple, cotangent: Array
) -> tuple[Array, Array | None, None, None]:
    x, weights, groups, used = residuals

    def multiply(each: tuple[Array, Array]) -> Array:
        return each[0] @ dense(take_entry(weights, each[1]), x.dtype).T

    to_x = _map_blocks(multiply, (cotangent, groups), used)
    if isinstance(weights, QuantizedArray):
        return to_x, None, None, None

    # Differentiating the map would add a whole array of zeros per block.
    def add(total: Array, each: tuple) -> tuple[Array, None]:
        rows, gradient, group = each
        return total.at[group].add(rows.T @ gradient), None

    blocks, zeros = (x, cotangent, groups), jnp.zeros_like(weights)
    if used is None:
        return to_x, lax.scan(add, zeros, blocks)[0], None, None

    def visit(number: Array, total: Array) -> Array:
        return add(total, take_entry(blocks, number))[0]

    return to_x, lax.fori_loop(0, used, visit, zeros), None, None


_multiply_blocks.defvjp(_multiply_forward, _multiply_backward)
