"""Softmax attention: grouped queries, windows with sinks, packed documents, ring caches."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tptt_jax.array_typing import Array, Bool, Float, Int
from tptt_jax.ops.residuals import save_mixed
from tptt_jax.ops.softcap import apply_softcap, softcap_slope

_MASKED = -1e30
# Rows are cut into this many pieces of at least so many queries; what lies above the diagonal
# and outside a piece is never computed.
_PIECES = 4
_PIECE = 128


class KeyValues(NamedTuple):
    """One part of what queries attend to.

    Attributes:
      keys: rotated [B, S, K, D]; or keys of each query's own [B, T, S, K, D], S small.
      values: the same shape.
      mask: True where the query may see the key [B, T, S].
      queries: the queries for these keys if they are rotated differently [B, T, H, D].
    """

    keys: Float[Array, "B *T S K D"]
    values: Float[Array, "B *T S K D"]
    mask: Bool[Array, "B T S"]
    queries: Float[Array, "B T H D"] | None = None


def attend(
    q: Float[Array, "B T H D"],
    parts: Sequence[KeyValues],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(scale q k^T) v over all parts together; the softmax is in float32.

    Keeping the parts apart saves joining them, which for a cache would copy it.

    Args:
      q: queries [B, T, H, D], rotated. H is a multiple of K.
      parts: keys and values, e.g. a cache, the tokens of this call, sinks.
      scale: factor on the logits.
      softcap: logits x become softcap * tanh(x / softcap).

    Returns:
      [B, T, H, D] in q's dtype; zero where a query may see nothing.
    """
    return _attend(q, tuple(parts), scale, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(q: Array, parts: tuple[KeyValues, ...], scale: float, softcap: float | None) -> Array:
    return _attend_forward(q, parts, scale, softcap)[0]


def _attend_forward(
    q: Array, parts: tuple[KeyValues, ...], scale: float, softcap: float | None
) -> tuple[Array, tuple]:
    """Output, and what the gradient is made from: logits are made again, not kept."""
    logits = [_masked_logits(_queries_of(q, part), part, scale, softcap) for part in parts]
    tops = [jnp.max(x, axis=-1, keepdims=True) for x in logits]
    # Far above what is masked: where all is, every weight is 0.
    top = jnp.maximum(functools.reduce(jnp.maximum, tops), _MASKED / 2)
    weights = [jnp.exp(x - top) for x in logits]
    total = jnp.maximum(sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights), 1e-30)
    outs = [
        _weigh_values(x.astype(part.values.dtype), part.values)
        for x, part in zip(weights, parts, strict=True)
    ]
    # Divided is what the weights, of which there are more, were multiplied into.
    out = functools.reduce(jnp.add, outs) / jnp.transpose(total, (0, 3, 1, 2, 4))
    out = out.reshape(q.shape).astype(q.dtype)
    out, log_total = save_mixed(out), save_mixed(top + jnp.log(total))
    return out, (q, parts, out, log_total)


def _attend_backward(
    scale: float, softcap: float | None, kept: tuple, gradient: Array
) -> tuple[Array, tuple[KeyValues, ...]]:
    q, parts, out, log_total = kept
    wide = log_total.dtype
    grouped = _grouped(gradient.astype(q.dtype), parts[0])
    # What a change of the total does to every weight [B, K, G, T, 1].
    products = jnp.einsum("btkgd,btkgd->bkgt", grouped, _grouped(out, parts[0]))
    common = products.astype(wide)[..., None]
    gradients, grad_q = [], jnp.zeros_like(q)
    for part in parts:
        queries = _queries_of(q, part)
        logits = _masked_logits(queries, part, scale, softcap)
        slope = scale * softcap_slope(logits, softcap)
        weights = jnp.exp(logits - log_total)
        grad_weights = _dot_keys(grouped, part.values).astype(wide)
        grad_values = _gather_tokens(weights.astype(grouped.dtype), grouped, part.values)
        grad_logits = (weights * (grad_weights - common) * slope).astype(queries.dtype)
        grad_keys = _gather_tokens(grad_logits, queries, part.keys)
        own = _weigh_values(grad_logits, part.keys).reshape(q.shape).astype(q.dtype)
        if part.queries is None:
            grad_q = grad_q + own
        no_mask = cast("Array", np.zeros(part.mask.shape, jax.dtypes.float0))
        queries_gradient = None if part.queries is None else own
        gradients.append(KeyValues(grad_keys, grad_values, no_mask, queries_gradient))
    return grad_q, tuple(gradients)


_attend.defvjp(_attend_forward, _attend_backward)


def _queries_of(q: Array, part: KeyValues) -> Array:
    """The queries for a part's keys [B, T, K, G, D]."""
    return _grouped(q if part.queries is None else part.queries, part)


def _masked_logits(queries: Array, part: KeyValues, scale: float, softcap: float | None) -> Array:
    """[B, K, G, T, S], at least float32."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    logits = apply_softcap(_dot_keys(queries, part.keys).astype(wide) * scale, softcap)
    return jnp.where(part.mask[:, None, None], logits, _MASKED)


def _grouped(x: Array, part: KeyValues) -> Array:
    """[B, T, H, D] -> [B, T, K, G, D]."""
    return x.reshape(*x.shape[:2], part.keys.shape[-2], -1, x.shape[-1])


def _dot_keys(q: Array, keys: Array) -> Array:
    """[B, T, K, G, D] x [B, S, K, D] or [B, T, S, K, D] -> [B, K, G, T, S]."""
    if keys.ndim == 4:
        # What is transposed is q and the result, never the far larger logits and weights.
        return jnp.einsum("bkgtd,bskd->bkgts", jnp.transpose(q, (0, 2, 3, 1, 4)), keys)
    # One dot product per token and key: as a batched product this would be B T K tiny ones.
    logits = jnp.sum(q[:, :, None] * keys[:, :, :, :, None], axis=-1)  # [B, T, S, K, G]
    return jnp.transpose(logits, (0, 3, 4, 1, 2))


def _weigh_values(weights: Array, values: Array) -> Array:
    """[B, K, G, T, S] x [B, S, K, D] or [B, T, S, K, D] -> [B, T, K, G, D]."""
    if values.ndim == 4:
        out = jnp.einsum("bkgts,bskd->bkgtd", weights, values)
        return jnp.transpose(out, (0, 3, 1, 2, 4))
    per_token = jnp.transpose(weights, (0, 3, 4, 1, 2))  # [B, T, S, K, G]
    return jnp.sum(per_token[..., None] * values[:, :, :, :, None], axis=2)


def _gather_tokens(x: Array, queries: Array, keys: Array) -> Array:
    """[B, K, G, T, S] x [B, T, K, G, D] -> what `keys` look like, and in their dtype."""
    if keys.ndim == 4:
        # What is transposed is again what is small: queries and result.
        by_head = jnp.transpose(queries, (0, 2, 3, 1, 4))
        out = jnp.einsum("bkgtd,bkgts->bkds", by_head, x)
        return jnp.transpose(out, (0, 3, 1, 2)).astype(keys.dtype)
    per_token = jnp.transpose(x, (0, 3, 4, 1, 2))  # [B, T, S, K, G]
    return jnp.einsum("btskg,btkgd->btskd", per_token, queries).astype(keys.dtype)


def attend_sequence(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    sinks: KeyValues | None = None,
    scale: float,
    softcap: float | None = None,
    block: int = 512,
) -> Float[Array, "B T H D"]:
    """Causal attention over whole rows in O(T min(T, window)) work and O(T) memory.

    Args:
      q: rotated queries [B, T, H, D].
      k: rotated keys [B, T, K, D].
      v: values [B, T, K, D].
      segment_ids: [B, T]; a query sees its own document only, 0 is padding. With a
        window, padding must not lie inside a document.
      window: tokens seen, the current one included; None: all before.
      sinks: first tokens that stay visible. The window leaves them to the sinks, so that
        none counts twice.
      scale: factor on the logits.
      softcap: see `attend`.
      block: rows longer than four times this are scanned, so many queries at a time, each with
        all keys that its window allows, later ones included; shorter ones are cut into four
        pieces at most, which leave later keys out.

    Returns:
      [B, T, H, D] in q's dtype; zero on padding.
    """
    tokens = q.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones((1, tokens), jnp.int32)
    segment_ids = jnp.broadcast_to(segment_ids, q.shape[:2])
    num_sinks = 0 if sinks is None else sinks.mask.shape[-1]
    starts = segment_starts(segment_ids)
    # What belongs to single queries is cut with them; keys of a whole row are not.
    row_sinks, query_sinks = _split_sinks(sinks)

    of_queries = (q, segment_ids, starts, query_sinks)

    def attend_some(
        queries: tuple, seen: tuple, first: Array | int, first_key: Array | int
    ) -> Array:
        """Consecutive queries to consecutive keys, from these places in the row on."""
        (q, ids, starts, own), (keys, values, key_ids) = queries, seen
        mask = _sequence_mask(ids, key_ids, starts, first, first_key, window, num_sinks)
        parts = [KeyValues(keys, values, mask)]
        if own is not None:
            parts.append(KeyValues(**(row_sinks | own)))
        return attend(q, parts, scale=scale, softcap=softcap)

    if tokens <= _PIECES * block:
        size = max(-(-tokens // (_PIECES * _PIECE)), 1) * _PIECE
        pieces = []
        for first in range(0, max(tokens, 1), size):
            last = min(first + size, tokens)
            first_key = 0 if window is None else max(0, first - window + 1)
            queries = jax.tree.map(lambda x, a=first, b=last: x[:, a:b], of_queries)
            seen = tuple(x[:, first_key:last] for x in (k, v, segment_ids))
            pieces.append(attend_some(queries, seen, first, first_key))
        return jnp.concatenate(pieces, axis=1)

    num_blocks = -(-tokens // block)
    pad = num_blocks * block - tokens
    reach = num_blocks * block if window is None else min(window, num_blocks * block)
    before = 0 if window is None else reach
    k, v, key_ids = (_pad_tokens(x, before, pad) for x in (k, v, segment_ids))
    blocks = jax.tree.map(lambda x: _cut(_pad_tokens(x, 0, pad), num_blocks), of_queries)

    @jax.checkpoint
    def run(index: Array, queries: tuple) -> Array:
        first = 0 if window is None else index * block
        size = k.shape[1] if window is None else block + before
        seen = tuple(lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (k, v, key_ids))
        return attend_some(queries, seen, index * block, first - before)

    _, out = lax.scan(lambda _, x: (None, run(*x)), None, (jnp.arange(num_blocks), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :tokens]


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the first token of every token's document; padding lies in no document.

    Args:
      segment_ids: [B, T], 0 = padding; documents are contiguous.

    Returns:
      int32 [B, T].
    """
    index = jnp.arange(segment_ids.shape[1])
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=0)
    fresh = jnp.where(segment_ids != previous, index, 0)
    return lax.cummax(fresh, axis=1)


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
    window: int | None,
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


def _pad_tokens(x: Array, before: int, after: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (before, after)
    return jnp.pad(x, widths)


def _cut(x: Array, num_blocks: int) -> Array:
    """[B, n * T, ...] -> [n, B, T, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 1, 0)
