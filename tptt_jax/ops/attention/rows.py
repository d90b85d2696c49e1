"""Softmax attention over whole rows: windows with sinks, packed documents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.ops.attention.blocks import Attended, KeyValues, attend
from tptt_jax.ops.attention.rope import RotaryAngles, rotate
from tptt_jax.ops.documents import segment_starts
from tptt_jax.ops.residuals import scan_blocks

# Number of pieces of a row, or groups of blocks, and least queries of a piece; products above the
# diagonal and outside the pieces are never computed.
_PIECES = 4
_PIECE = 128


def attend_sequence(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    angles: RotaryAngles | None = None,
    segment_ids: Int[Array, "#B S"] | None = None,
    starts: Int[Array, "B T"] | None = None,
    window: int | None = None,
    narrower: Int[Array, ""] | None = None,
    sinks: KeyValues | None = None,
    scale: float,
    softcap: float | None = None,
    block: int = 512,
) -> Attended:
    """Causal attention over whole rows in O(T min(T, window)) work and O(T) memory.

    Without a window a row in four parts multiplies five eighths of all pairs, where half would do.

    Args:
      q: queries [B, T, H, D].
      k: keys [B, S, K, D]; S - T tokens come before those of the queries.
      v: values [B, S, K, D].
      angles: rotations that q and k still need, if S = T; None: none. Pieces of short rows are
        rotated one by one: gradients of whole rows, put together from pieces, would be rotated at
        twice the cost on CPU.
      segment_ids: [B, S]; a query sees its own document only, 0 is padding. With a
        window, padding must not lie inside a document.
      starts: place of the first token of each query's document, counted from the first query; None:
        all documents start among the keys.
      window: tokens seen, the current one included; None: all before.
      narrower: a traced window of at most `window` that is used in its place; None: `window`.
      sinks: first tokens that stay visible. The window leaves them to the sinks, so that
        none counts twice.
      scale: factor on the logits.
      softcap: see `attend`.
      block: rows longer than four times this are scanned in blocks of this many queries. Without a
        window, or if it is shorter, a row is cut into four parts at most, each of which leaves
        out what comes after it.

    Returns:
      Output [B, T, H, D] in q's dtype, zero on padding, and the log of the normaliser [B, T, H].
    """
    tokens = k.shape[1]
    before = tokens - q.shape[1]
    if window is not None and window >= tokens:
        window = None
    seen_at_most = window if narrower is None else narrower
    if segment_ids is None:
        segment_ids = jnp.ones((1, tokens), jnp.int32)
    segment_ids = jnp.broadcast_to(segment_ids, k.shape[:2])
    num_sinks = 0 if sinks is None else sinks.mask.shape[-1]
    if starts is None:
        starts = segment_starts(segment_ids)[:, before:] - before
    # Arrays with an axis of queries are cut with them; keys of a whole row are not.
    row_sinks, query_sinks = _split_sinks(sinks)
    in_pieces = tokens <= _PIECES * block
    if not in_pieces:
        q, k = rotate(q, angles), rotate(k, angles)

    of_queries = (q, segment_ids[:, before:], starts, query_sinks)
    of_keys = (k, v, segment_ids)

    def attend_some(
        queries: tuple, seen: tuple, first: Array | int, first_key: Array | int
    ) -> Attended:
        """Attention of consecutive queries to consecutive keys, from these places in the row."""
        (q, ids, starts, own), (keys, values, key_ids) = queries, seen
        mask = _sequence_mask(ids, key_ids, starts, first, first_key, seen_at_most, num_sinks)
        parts = [KeyValues(keys, values, mask)]
        if own is not None:
            parts.append(KeyValues(**(row_sinks | own)))
        return attend(q, parts, scale=scale, softcap=softcap)

    if in_pieces:
        return _run_pieces(attend_some, of_queries, of_keys, angles, window)
    return _run_blocks(attend_some, of_queries, of_keys, window, block)


def _run_pieces(
    attend_some: Callable[..., Attended],
    of_queries: tuple,
    of_keys: tuple,
    angles: RotaryAngles | None,
    window: int | None,
) -> Attended:
    """A short row, piece by piece, each rotated separately."""
    tokens = of_queries[0].shape[1]
    before = of_keys[0].shape[1] - tokens
    size = max(-(-tokens // (_PIECES * _PIECE)), 1) * _PIECE
    pieces = []
    for first in range(0, max(tokens, 1), size):
        last = min(first + size, tokens)
        first_key = -before if window is None else max(-before, first - window + 1)
        q, *others = _tokens(of_queries, first, last)
        k, *rest = _tokens(of_keys, before + first_key, before + last)
        q = rotate(q, _tokens(angles, first, last))
        k = rotate(k, _tokens(angles, first_key, last))
        pieces.append(attend_some((q, *others), (k, *rest), first, first_key))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)


def _run_blocks(
    attend_some: Callable[..., Attended],
    of_queries: tuple,
    of_keys: tuple,
    window: int | None,
    block: int,
) -> Attended:
    """A long row, group by group, each scanned in blocks."""
    batch, tokens = of_queries[0].shape[:2]
    num_blocks = -(-tokens // block)
    pad, before = num_blocks * block - tokens, of_keys[0].shape[1] - tokens
    front = before if window is None else max(window, before)
    of_keys = _pad_tokens(of_keys, front - before, pad)
    blocks = jax.tree.map(lambda x: _cut(x, num_blocks), _pad_tokens(of_queries, 0, pad))

    def run_group(start: int, stop: int) -> Attended:
        """Blocks, each to the keys that its window allows, or all to those before the end."""
        keys_before = _tokens(of_keys, 0, front + stop * block)

        def run(_: None, numbered: tuple) -> tuple[None, Attended]:
            index, queries = numbered
            first = index * block
            if window is None:
                return None, attend_some(queries, keys_before, first, -front)
            size, place = window + block, first + front - window
            seen = (lax.dynamic_slice_in_dim(x, place, size, axis=1) for x in keys_before)
            return None, attend_some(queries, tuple(seen), first, first - window)

        group = jax.tree.map(lambda x: x[start:stop], blocks)
        return scan_blocks(run, None, (jnp.arange(start, stop), group))[1]

    size = -(-num_blocks // _PIECES) if window is None else num_blocks
    starts = range(0, num_blocks, size)
    groups = [run_group(x, min(x + size, num_blocks)) for x in starts]

    def join(*parts: Array) -> Array:
        whole = jnp.moveaxis(jnp.concatenate(parts), 0, 1)
        return whole.reshape(batch, -1, *whole.shape[3:])[:, :tokens]

    return jax.tree.map(join, *groups)


def _split_sinks(sinks: KeyValues | None) -> tuple[dict[str, Array], dict[str, Array] | None]:
    """Fields that are the same for all queries of a row, and fields with a token axis."""
    if sinks is None:
        return {}, None
    fields = {name: x for name, x in sinks._asdict().items() if x is not None}
    whole = {} if sinks.keys.ndim == 5 else {name: fields.pop(name) for name in ("keys", "values")}
    return whole, fields


def _sequence_mask(
    query_ids: Array,
    key_ids: Array,
    starts: Array,
    first_query: Array | int,
    first_key: Array | int,
    window: int | Array | None,
    num_sinks: int,
) -> Array:
    """[B, T, S]: same document, not later, inside the window, and not a sink."""
    query = first_query + jnp.arange(query_ids.shape[1])[:, None]
    key = first_key + jnp.arange(key_ids.shape[1])[None, :]
    mask = (key <= query)[None] & (query_ids[:, :, None] == key_ids[:, None])
    mask &= (query_ids != 0)[:, :, None]
    if window is not None:
        mask &= (key > query - window)[None]
    # Not only the same id: an id that comes back later is another document.
    return mask & (key[None] >= starts[:, :, None] + num_sinks)


def _tokens(tree: Any, first: int, last: int) -> Any:
    """Tokens `first` to `last` - 1 of arrays [B, T, ...]; None stays None."""
    return jax.tree.map(lambda x: x[:, first:last], tree)


def _pad_tokens(tree: Any, before: int, after: int) -> Any:
    """The same arrays with zeros before and after their tokens."""

    def pad(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[1] = (before, after)
        return jnp.pad(x, widths)

    return jax.tree.map(pad, tree)


def _cut(x: Array, num_blocks: int) -> Array:
    """[B, n * T, ...] -> [n, B, T, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 1, 0)
