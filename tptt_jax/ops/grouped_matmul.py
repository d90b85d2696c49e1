"""Products of groups of rows with one matrix each, for mixtures of experts."""

from typing import NamedTuple

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
    """

    slots: Int[Array, "M"]
    groups: Int[Array, "blocks"]
    num_slots: int


def group_rows(group_of_row: Int[Array, "M"], num_groups: int) -> Grouping:
    """Sorts rows into blocks of one group each, without dropping any.

    Args:
      group_of_row: [M], in [0, num_groups).
      num_groups: static.

    Returns:
      The layout. Every group fills whole blocks; there are at most M / block + min(M,
      num_groups) of them, all counted whether they are used or not.
    """
    rows = group_of_row.shape[0]
    block = _block_rows(rows, num_groups)
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
    return Grouping(slots, groups, num_blocks * block)


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
    out = _multiply_blocks(blocks, weights, grouping.groups)
    return save_product(out.reshape(grouping.num_slots, -1)[grouping.slots])


def _block_rows(rows: int, num_groups: int) -> int:
    """About the rows that a group has, a power of two: larger wastes work, smaller matrices."""
    block = 1
    while block < 128 and block * num_groups < rows:
        block *= 2
    return block


@jax.custom_vjp
def _multiply_blocks(x: Array, weights: Weight, groups: Array) -> Array:
    """[blocks, rows, I] x [X, I, O] -> [blocks, rows, O]."""

    def multiply(each: tuple[Array, Array]) -> Array:
        return each[0] @ dense(take_entry(weights, each[1]), x.dtype)

    return lax.map(multiply, (x, groups))


def _multiply_forward(x: Array, weights: Weight, groups: Array) -> tuple[Array, tuple]:
    return _multiply_blocks(x, weights, groups), (x, weights, groups)


def _multiply_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array | None, None]:
    x, weights, groups = residuals

    def multiply(each: tuple[Array, Array]) -> Array:
        return each[0] @ dense(take_entry(weights, each[1]), x.dtype).T

    to_x = lax.map(multiply, (cotangent, groups))
    if isinstance(weights, QuantizedArray):
        return to_x, None, None

    # Differentiating the map would add a whole array of zeros per block.
    def add(total: Array, each: tuple) -> tuple[Array, None]:
        rows, gradient, group = each
        return total.at[group].add(rows.T @ gradient), None

    to_weights, _ = lax.scan(add, jnp.zeros_like(weights), (x, cotangent, groups))
    return to_x, to_weights, None


_multiply_blocks.defvjp(_multiply_forward, _multiply_backward)
