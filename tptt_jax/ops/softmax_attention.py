"""Softmax attention: grouped queries, windows with sinks, packed documents, ring caches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Bool, Float, Int

_MASKED = -1e30


class SinkInputs(NamedTuple):
    """What a windowed layer needs to go on seeing a document's first tokens.

    Attributes:
      queries: rotated at the capped position [B, T, H, D].
      keys: of each query's own document [B, T, Z, K, D], or of the whole row [B, 1, Z, K, D].
      values: the same shape.
      valid: whether the query may look at the sink [B, T, Z].
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B TZ Z K D"]
    values: Float[Array, "B TZ Z K D"]
    valid: Bool[Array, "B T Z"]


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: SinkInputs | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(scale q k^T) v with an explicit mask; the softmax is in float32.

    Args:
      q: queries [B, T, H, D], rotated. H is a multiple of K.
      k: keys [B, S, K, D], rotated.
      v: values [B, S, K, D].
      mask: True where the query may see the key [B, T, S].
      scale: factor on the logits.
      softcap: logits x become softcap * tanh(x / softcap).
      sinks: further keys with queries of their own, in the same softmax.

    Returns:
      [B, T, H, D] in q's dtype; zero where a query may see nothing.
    """
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = (batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def weigh(logits: Array, allowed: Array) -> Array:
        logits = logits.astype(wide) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        return jnp.where(allowed[:, None, None], logits, _MASKED)

    logits = weigh(jnp.einsum("btkgd,bskd->bkgts", q.reshape(grouped), k), mask)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sink_logits = weigh(_sink_logits(sinks.queries.reshape(grouped), sinks.keys), sinks.valid)
        top = jnp.maximum(top, jnp.max(sink_logits, axis=-1, keepdims=True))
    top = lax.stop_gradient(top)
    weights = jnp.where(mask[:, None, None], jnp.exp(logits - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        sink_weights = jnp.where(sinks.valid[:, None, None], jnp.exp(sink_logits - top), 0)
        total += jnp.sum(sink_weights, axis=-1, keepdims=True)
    total = jnp.maximum(total, 1e-30)
    out = jnp.einsum("bkgts,bskd->btkgd", (weights / total).astype(v.dtype), v)
    if sinks is not None:
        out += _weigh_sinks((sink_weights / total).astype(v.dtype), sinks.values)
    return out.reshape(q.shape).astype(q.dtype)


def _sink_logits(q: Array, keys: Array) -> Array:
    """[B, T, K, G, D] x [B, T or 1, Z, K, D] -> [B, K, G, T, Z]."""
    if keys.shape[1] == 1:
        return jnp.einsum("btkgd,bzkd->bkgtz", q, keys[:, 0])
    # One dot product per token and sink: as a batched product this would be B T K tiny ones.
    logits = jnp.sum(q[:, :, None] * keys[:, :, :, :, None], axis=-1)  # [B, T, Z, K, G]
    return jnp.transpose(logits, (0, 3, 4, 1, 2))


def _weigh_sinks(weights: Array, values: Array) -> Array:
    """[B, K, G, T, Z] x [B, T or 1, Z, K, D] -> [B, T, K, G, D]."""
    if values.shape[1] == 1:
        return jnp.einsum("bkgtz,bzkd->btkgd", weights, values[:, 0])
    per_token = jnp.transpose(weights, (0, 3, 4, 1, 2))  # [B, T, Z, K, G]
    return jnp.sum(per_token[..., None] * values[:, :, :, :, None], axis=2)


def attend_sequence(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    sinks: SinkInputs | None = None,
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
      block: queries handled at a time; longer rows are scanned and rematerialised.

    Returns:
      [B, T, H, D] in q's dtype; zero on padding.
    """
    tokens = q.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones((1, tokens), jnp.int32)
    segment_ids = jnp.broadcast_to(segment_ids, q.shape[:2])
    num_sinks = 0 if sinks is None else sinks.keys.shape[2]
    starts = segment_starts(segment_ids)
    if tokens <= block:
        mask = _sequence_mask(segment_ids, segment_ids, starts, 0, 0, window, num_sinks)
        return attend(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)

    num_blocks = -(-tokens // block)
    pad = num_blocks * block - tokens
    reach = num_blocks * block if window is None else min(window, num_blocks * block)
    before = 0 if window is None else reach
    k, v, key_ids = (_pad_tokens(x, before, pad) for x in (k, v, segment_ids))
    blocks = jax.tree.map(
        lambda x: _cut(_pad_tokens(x, 0, pad), num_blocks), (q, segment_ids, starts)
    )
    sink_blocks = None if sinks is None else jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_blocks, *x.shape))
        if x.shape[1] == 1
        else _cut(_pad_tokens(x, 0, pad), num_blocks),
        sinks,
    )

    @jax.checkpoint
    def run(index: Array, parts: tuple) -> Array:
        (q_part, ids, start), sink_part = parts
        first = 0 if window is None else index * block
        size = k.shape[1] if window is None else block + before
        keys, values, seen_ids = (
            lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (k, v, key_ids)
        )
        mask = _sequence_mask(
            ids, seen_ids, start, index * block, first - before, window, num_sinks
        )
        return attend(q_part, keys, values, mask, scale=scale, softcap=softcap, sinks=sink_part)

    _, out = lax.scan(
        lambda _, x: (None, run(*x)), None, (jnp.arange(num_blocks), (blocks, sink_blocks))
    )
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
    if num_sinks:
        mask &= key[None] >= starts[:, :, None] + num_sinks
    return mask


def _pad_tokens(x: Array, before: int, after: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (before, after)
    return jnp.pad(x, widths)


def _cut(x: Array, num_blocks: int) -> Array:
    """[B, n * T, ...] -> [n, B, T, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 1, 0)
