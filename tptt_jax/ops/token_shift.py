"""Shifts over the valid tokens of a document."""

import jax
import jax.numpy as jnp

from tptt_jax.array_checks import check_arrays, check_axes
from tptt_jax.array_typing import Array, Bool, Int, SegmentIds, Shaped
from tptt_jax.ops.context import is_split, take_split_tokens
from tptt_jax.ops.documents import document_ordinals


def shift_tokens(
    x: Shaped[Array, "B T ..."], steps: int, segment_ids: SegmentIds | None = None
) -> tuple[Shaped[Array, "B T ..."], Bool[Array, "B T"]]:
    """Gives every token the value of an earlier token of its document.

    Padding is skipped: `steps` counts valid tokens only.

    Args:
      x: one value per token [B, T, ...], any dtype.
      steps: how many valid tokens to look back, at least 0.
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.

    Returns:
      The shifted values, like x and zero where there is no such token or the token is
      padding, and whether there is one [B, T].

    Raises:
      TypeError: if x or segment_ids is not an array.
      ValueError: if steps is negative, x has fewer than two axes, or segment_ids is not [B, T].
    """
    check_axes("x", x, "B T ...")
    check_arrays(segment_ids=segment_ids)
    if steps < 0:
        raise ValueError(f"steps must be at least 0 (tokens never look ahead), got {steps}.")
    if segment_ids is None:
        length = x.shape[1]
        kept = x[:, : max(length - steps, 0)]
        missing = ((0, 0), (length - kept.shape[1], 0))
        exists = jnp.broadcast_to(jnp.arange(length) >= steps, x.shape[:2])
        return jnp.pad(kept, missing + ((0, 0),) * (x.ndim - 2)), exists
    if segment_ids.shape != x.shape[:2]:
        raise ValueError(
            f"segment_ids must have shape {x.shape[:2]} ([B, T]), got {segment_ids.shape}."
        )
    source, exists = _neighbours(segment_ids, -steps)
    if is_split(x.shape[1]):
        places = jnp.arange(x.shape[1])
        taken = take_split_tokens(x, jnp.where(exists, source, places), steps)
        return jnp.where(exists.reshape(*exists.shape, *(1,) * (x.ndim - 2)), taken, 0), exists
    target, is_read = _neighbours(segment_ids, steps)
    return _gather_rows(x, source, exists, target, is_read), exists


def _neighbours(
    segment_ids: SegmentIds, offset: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Position of the valid token `offset` valid tokens away, and whether there is one."""
    length = segment_ids.shape[1]
    valid = segment_ids != 0
    ordinals = document_ordinals(segment_ids)
    rank = jnp.cumsum(valid, axis=1) - 1 + offset
    valid_first = jnp.argsort(~valid, axis=1, stable=True)
    index = jnp.take_along_axis(valid_first, jnp.clip(rank, 0, max(length - 1, 0)), axis=1)
    same = jnp.take_along_axis(ordinals, index, axis=1) == ordinals
    inside = (rank >= 0) & (rank < jnp.sum(valid, axis=1, keepdims=True))
    return index, valid & inside & same


@jax.custom_vjp
def _gather_rows(x, source, exists, target, is_read):
    """y[b, t] = x[b, source[b, t]] where exists, else 0.

    No token is read twice, so the gradient is the gather in the other direction (`target`,
    `is_read`): the scatter-add that autodiff would use is slow on CPU.
    """
    del target, is_read
    rows = jax.vmap(lambda row, index: row[index])(x, source)
    return jnp.where(exists.reshape(exists.shape + (1,) * (x.ndim - 2)), rows, 0)


def _gather_rows_forward(x, source, exists, target, is_read):
    return _gather_rows(x, source, exists, target, is_read), (source, exists, target, is_read)


def _gather_rows_backward(residuals, grad):
    source, exists, target, is_read = residuals
    return _gather_rows(grad, target, is_read, source, exists), None, None, None, None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)
