"""Eviction of tokens from a window, within a row."""

import functools

import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Int, Positions, SegmentIds, Shaped
from tptt_jax.ops.context import is_split, split_tokens, with_tokens_before
from tptt_jax.ops.documents import document_ordinals, segment_starts


def delay_tokens(
    x: Shaped[Array, "B T ..."], steps: int | Int[Array, ""], most: int | None = None
) -> Shaped[Array, "B T ..."]:
    """Shifts values by `steps` places to the right; the first `steps` places become zero.

    Args:
      x: one value per token [B, T, ...].
      steps: places; an integer, or a traced scalar of at most `most`.
      most: upper bound of a traced `steps`.

    Returns:
      The delayed values, like x.
    """
    tokens = x.shape[1]
    if is_split(tokens):
        farthest = steps if isinstance(steps, int) else most
        assert farthest is not None, "a traced number of steps needs a bound"
        return split_tokens(functools.partial(_delay_shard, farthest), (x,), (jnp.asarray(steps),))
    if isinstance(steps, int):
        steps = min(steps, tokens)
        return jnp.pad(x[:, : tokens - steps], _before(x, steps))
    assert most is not None, "a traced number of steps needs a bound"
    most = min(most, tokens)
    return lax.dynamic_slice_in_dim(jnp.pad(x, _before(x, most)), most - steps, tokens, axis=1)


def _delay_shard(most: int, x: Array, steps: Array) -> Array:
    return lax.dynamic_slice_in_dim(with_tokens_before(x, most), most - steps, x.shape[1], axis=1)


def evicted_ids(
    positions: Positions, segment_ids: SegmentIds | None, window: int | Int[Array, ""]
) -> Int[Array, "B T"]:
    """The document of the token that leaves the window at each place, 0 where none does.

    The token at position p evicts position p - window. Documents are renumbered: one that fits the
    window evicts nothing, and could not separate two others with the same id.

    Args:
      positions: within the document [B, T].
      segment_ids: [B, T], 0 = padding; None: one document per row, no padding.
      window: tokens that stay visible, the current one included.
    """
    leaves = positions >= window
    if segment_ids is None:
        return leaves.astype(jnp.int32)
    if is_split(segment_ids.shape[1]):
        # Other numbers of the documents, for which devices exchange one number each.
        return jnp.where(leaves & (segment_ids != 0), segment_starts(segment_ids) + 1, 0)
    return jnp.where(leaves & (segment_ids != 0), document_ordinals(segment_ids) + 1, 0)


def _before(x: Array, count: int) -> tuple[tuple[int, int], ...]:
    return ((0, 0), (count, 0), *((0, 0),) * (x.ndim - 2))
