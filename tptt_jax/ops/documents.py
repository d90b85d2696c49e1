"""Where the documents of a row begin and end, and where a token stands in its document.

`segment_ids` [B, T] give each token the id of its document, 0 for padding. Functions that say
"contiguous" want every document in one piece, as `order_padding` leaves it. The others take padding
anywhere: it interrupts a document without ending it.
"""

import jax.numpy as jnp
from jax import lax

from tptt_jax.array_checks import check_axes
from tptt_jax.array_typing import Array, Bool, Int, Positions, SegmentIds, Shaped
from tptt_jax.ops.context import running_max


def follows_another(segment_ids: SegmentIds) -> Bool[Array, "B T"]:
    """Whether each token is the first of a document that is not the first of its row.

    A document begins where the last valid token before has another id, so an id that returns after
    another one begins a new document, and padding inside a document does not.

    Args:
      segment_ids: document ids [B, T], 0 for padding, anywhere.
    """
    places = jnp.arange(segment_ids.shape[1])
    latest = lax.cummax(jnp.where(segment_ids != 0, places, -1), axis=1)
    before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return (segment_ids != 0) & (before >= 0) & (segment_ids != previous)


def _begins_run(segment_ids: SegmentIds) -> Bool[Array, "B T"]:
    """Whether the place before has another id; so begin contiguous documents, and padding."""
    return segment_ids != jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))


def document_ordinals(segment_ids: SegmentIds) -> Int[Array, "B T"]:
    """Numbers the documents of each row: 0, 1, 2, ...

    A document ends where a different non-zero id follows, so padding in its middle does not end
    it, and an id that returns after another one starts a new document.

    Args:
      segment_ids: document ids [B, T], 0 for padding.

    Returns:
      The number of document starts before each token, the row's first one not counted
      [B, T]; padding carries the number of the token before it (0 at the start of the row).
    """
    check_axes("segment_ids", segment_ids, "B T")
    return jnp.cumsum(follows_another(segment_ids), axis=1, dtype=jnp.int32)


def tokens_so_far(segment_ids: SegmentIds) -> Int[Array, "B T"]:
    """Tokens of the document up to and including each token [B, T]; padding counts none.

    Args:
      segment_ids: document ids [B, T], 0 for padding, anywhere.
    """
    count = jnp.cumsum(segment_ids != 0, axis=1)
    before = jnp.where(follows_another(segment_ids), count - 1, 0)
    return count - lax.cummax(before, axis=1)


def segment_starts(segment_ids: SegmentIds) -> Int[Array, "B T"]:
    """Index of the first token of every token's document; padding lies in no document.

    Args:
      segment_ids: [B, T], 0 = padding; documents are contiguous.

    Returns:
      int32 [B, T].
    """
    index = jnp.arange(segment_ids.shape[1])
    return running_max(jnp.where(_begins_run(segment_ids), index, 0))


def document_lengths(positions: Positions, segment_ids: SegmentIds | None) -> Int[Array, "B T"]:
    """Tokens of the document that each token belongs to.

    Args:
      positions: within the document [B, T]; the last one of a document is its largest.
      segment_ids: [B, T], documents are contiguous; None: one document per row.
    """
    if segment_ids is None:
        return jnp.broadcast_to(jnp.max(positions, axis=1, keepdims=True) + 1, positions.shape)
    tokens = segment_ids.shape[1]
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    last = jnp.where(segment_ids != following, jnp.arange(tokens), tokens)
    last = lax.cummin(last, axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def count_positions(
    shape: tuple[int, ...], segment_ids: SegmentIds | None, length: Int[Array, "B"] | None
) -> Positions:
    """Tokens of the same document before each token [B, T]; padding gets any number.

    Args:
      shape: (B, T).
      segment_ids: [B, T], 0 = padding; documents are contiguous. None: one document per row.
      length: tokens of each row before this call [B]; a row is then one document, and padding may
        lie anywhere. None: rows start here.
    """
    if segment_ids is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return positions if length is None else positions + length[:, None]
    count = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32) - 1
    if length is not None:
        return jnp.maximum(count, 0) + length[:, None]
    first = jnp.where(_begins_run(segment_ids), count, 0)
    return jnp.maximum(count - lax.cummax(jnp.maximum(first, 0), axis=1), 0)


def order_padding(segment_ids: SegmentIds) -> Int[Array, "B T"]:
    """The order of places that moves padding to the end of its row; see `take_places`."""
    return jnp.argsort(segment_ids == 0, axis=1, stable=True)


def take_places(x: Shaped[Array, "B T ..."], order: Int[Array, "B T"]) -> Shaped[Array, "B T ..."]:
    """The values [B, T, ...] at these places of each row."""
    index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)
