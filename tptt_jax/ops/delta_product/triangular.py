"""Inverse and solve for unit lower triangular matrices, made of matrix products.

The library's batched triangular solve deadlocks at random on CPU (jaxlib 0.10.2), and powers
of L overflow for strongly correlated keys; substitution in small blocks does neither.
"""

import jax
import jax.numpy as jnp

from tptt_jax.array_checks import check_arrays
from tptt_jax.array_typing import Array, Float
from tptt_jax.ops.manual_axes import vary_along, varying_axes

_BLOCK = 16


@jax.custom_vjp
def invert_unit_lower(lower: Float[Array, "*batch M M"]) -> Float[Array, "*batch M M"]:
    """Inverts I + L for strictly lower triangular L.

    Diagonal blocks of 16 x 16 are inverted by forward substitution, all at once, and merged in
    pairs: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]].

    Args:
      lower: L [..., M, M]; the diagonal and what is above it are not read.

    Returns:
      (I + L)^-1 [..., M, M], unit lower triangular, in L's dtype.

    Raises:
      ValueError: if L is not square.
    """
    check_arrays(lower=lower)
    if lower.ndim < 2 or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"lower must be square ([..., M, M]), got shape {lower.shape}.")
    size = lower.shape[-1]
    block = min(_BLOCK, 1 << max(size - 1, 0).bit_length())
    padded = block
    while padded < size:
        padded *= 2
    margin = ((0, 0),) * (lower.ndim - 2) + ((0, padded - size),) * 2
    lower = jnp.pad(lower, margin) if padded > size else lower
    inverse = _invert_diagonal_blocks(_diagonal_blocks(lower, block))
    while block < padded:
        corner = _diagonal_blocks(lower, 2 * block)[..., block:, :block]
        pairs = inverse.reshape(*inverse.shape[:-3], -1, 2, block, block)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -_matmul(second, _matmul(corner, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :size, :size]


def _diagonal_blocks(x: Array, block: int) -> Array:
    """[..., M, M] -> [..., M / block, block, block]."""
    starts = range(0, x.shape[-1], block)
    return jnp.stack([x[..., i : i + block, i : i + block] for i in starts], axis=-3)


def _invert_diagonal_blocks(blocks: Array) -> Array:
    """Forward substitution: once row j of the inverse is done, L[:, j] times it leaves the rest.

    The batch is the innermost axis meanwhile: vector units want it there.
    """
    size = blocks.shape[-1]
    if size == 1:
        return jnp.ones_like(blocks)
    columns = jnp.transpose(jnp.tril(blocks, -1).reshape(-1, size, size), (2, 1, 0))

    def eliminate(rows, step):
        j, column = step
        return rows - column[:, None] * rows[j], None

    rows = jnp.broadcast_to(jnp.eye(size, dtype=blocks.dtype)[..., None], columns.shape)
    rows = vary_along(rows, varying_axes(columns))
    rows, _ = jax.lax.scan(eliminate, rows, (jnp.arange(size - 1), columns[:-1]))
    return jnp.transpose(rows, (2, 0, 1)).reshape(blocks.shape)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _invert_forward(lower):
    inverse = invert_unit_lower(lower)
    return inverse, inverse


def _invert_backward(inverse, grad):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_matmul(_matmul(transposed, grad), transposed), -1),)


invert_unit_lower.defvjp(_invert_forward, _invert_backward)


@jax.custom_vjp
def solve_unit_lower(
    lower: Float[Array, "*batch M M"], rhs: Float[Array, "*batch M X"]
) -> Float[Array, "*batch M X"]:
    """Solves (I + L) x = rhs for strictly lower triangular L; gradients reuse the inverse.

    Args:
      lower: L [..., M, M]; the diagonal and what is above it are not read.
      rhs: right-hand sides [..., M, X], with the same leading axes as L.

    Returns:
      x [..., M, X] in rhs's dtype.
    """
    return _matmul(invert_unit_lower(lower), rhs)


def _solve_forward(lower, rhs):
    inverse = invert_unit_lower(lower)
    solution = _matmul(inverse, rhs)
    return solution, (inverse, solution)


def _solve_backward(residuals, grad):
    inverse, solution = residuals
    grad_rhs = _matmul(jnp.swapaxes(inverse, -1, -2), grad)
    outer = _matmul(grad_rhs, jnp.swapaxes(solution, -1, -2))
    return -jnp.tril(outer, -1), grad_rhs


solve_unit_lower.defvjp(_solve_forward, _solve_backward)
