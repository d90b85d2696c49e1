"""The softmax branch: rotary embedding, windows with sinks, the KV cache."""

from typing import NamedTuple

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, Int, Positions, SegmentIds
from tptt_jax.config import LayerKind, LizaConfig, ModelConfig
from tptt_jax.layers.cache import (
    KeyValueCache,
    num_sinks,
    slot_positions,
    softmax_window,
    write_ring,
    write_sinks,
)
from tptt_jax.ops.rope import RotaryAngles, rotary_angles, rotate
from tptt_jax.ops.softmax_attention import SinkInputs, attend, attend_sequence, segment_starts


class TokenContext(NamedTuple):
    """What every layer of one kind needs to know about the tokens of a call.

    Attributes:
      positions: within the document [B, T].
      segment_ids: [B, T], 0 = padding; None: one document per row, no padding.
      length: tokens of each row before this call [B]; None without a cache.
      angles: rotation of every token.
      sink_angles: rotation of queries that look at the sinks; None without sinks.
    """

    positions: Positions
    segment_ids: SegmentIds | None
    length: Int[Array, "B"] | None
    angles: RotaryAngles
    sink_angles: RotaryAngles | None

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """False on padding."""
        if self.segment_ids is None:
            return jnp.ones(self.positions.shape, bool)
        return self.segment_ids != 0


def token_context(
    config: ModelConfig,
    liza: LizaConfig | None,
    kind: LayerKind,
    positions: Positions,
    segment_ids: SegmentIds | None,
    length: Int[Array, "B"] | None,
) -> TokenContext:
    """Computes the rotations that all layers of a kind share."""
    rope = config.rope_of(kind)
    sink_angles = None
    if sinks := num_sinks(config, liza, kind):
        window = softmax_window(config, liza, kind)
        assert window is not None
        # Farther than this no query is from a sink, whatever the length of the document.
        capped = jnp.minimum(positions, window + sinks)
        sink_angles = rotary_angles(capped, rope, config.head_dim)
    angles = rotary_angles(positions, rope, config.head_dim)
    return TokenContext(positions, segment_ids, length, angles, sink_angles)


class SoftmaxSettings(NamedTuple):
    """The static side of one layer's softmax attention."""

    window: int | None
    sinks: int
    scale: float
    softcap: float | None


def softmax_settings(
    config: ModelConfig, liza: LizaConfig | None, kind: LayerKind
) -> SoftmaxSettings:
    """What `config` and `liza` say about layers of this kind."""
    return SoftmaxSettings(
        softmax_window(config, liza, kind),
        num_sinks(config, liza, kind),
        config.attention_scale,
        config.attention_softcap,
    )


def apply_softmax(
    settings: SoftmaxSettings,
    context: TokenContext,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    cache: KeyValueCache | None = None,
) -> tuple[Float[Array, "B T H D"], KeyValueCache | None]:
    """Rotates q and k, attends, and extends the cache.

    Args:
      settings: window and scale of the layer.
      context: of the tokens of this call.
      q: queries [B, T, H, D], after any q norm, not rotated.
      k: keys [B, T, K, D], likewise.
      v: values [B, T, K, D].
      cache: None attends within the rows alone.

    Returns:
      [B, T, H, D] in q's dtype, zero on padding; the new cache, or None.
    """
    sink_queries = None if context.sink_angles is None else rotate(q, context.sink_angles)
    q, k = rotate(q, context.angles), rotate(k, context.angles)
    if cache is None:
        sinks = None
        if sink_queries is not None:
            sinks = _row_sinks(context, sink_queries, k, v, settings.sinks)
        out = attend_sequence(
            q,
            k,
            v,
            segment_ids=context.segment_ids,
            window=settings.window,
            sinks=sinks,
            scale=settings.scale,
            softcap=settings.softcap,
        )
        return out, None
    return _attend_cached(settings, context, q, k, v, cache, sink_queries)


def _row_sinks(context: TokenContext, queries: Array, k: Array, v: Array, count: int) -> SinkInputs:
    """The first `count` tokens of each token's own document."""
    tokens = k.shape[1]
    if context.segment_ids is None:
        visible = jnp.arange(count) <= jnp.arange(tokens)[:, None]
        first = min(count, tokens)
        pad = ((0, 0), (0, count - first), (0, 0), (0, 0))
        keys, values = (jnp.pad(x[:, :first], pad)[:, None] for x in (k, v))
        return SinkInputs(
            queries, keys, values, jnp.broadcast_to(visible, (k.shape[0], *visible.shape))
        )
    start = segment_starts(context.segment_ids)
    index = start[..., None] + jnp.arange(count)  # [B, T, Z]
    visible = (index <= jnp.arange(tokens)[:, None]) & context.valid[..., None]
    rows = jnp.arange(k.shape[0])[:, None, None]
    index = jnp.minimum(index, tokens - 1)
    return SinkInputs(queries, k[rows, index], v[rows, index], visible)


def _attend_cached(
    settings: SoftmaxSettings,
    context: TokenContext,
    q: Array,
    k: Array,
    v: Array,
    cache: KeyValueCache,
    sink_queries: Array | None,
) -> tuple[Array, KeyValueCache]:
    assert context.length is not None
    valid, positions = context.valid, context.positions
    slots, sink_slots = cache.keys.shape[1], cache.sink_keys.shape[1]
    length = context.length + jnp.sum(valid, axis=1)
    new_cache = KeyValueCache(
        write_ring(cache.keys, k, positions, valid, length),
        write_ring(cache.values, v, positions, valid, length),
        write_sinks(cache.sink_keys, k, positions, valid),
        write_sinks(cache.sink_values, v, positions, valid),
    )
    if q.shape[1] == 1 or settings.window is None:
        # Nothing that these queries still see has been overwritten.
        keys, values = new_cache.keys, new_cache.values
        key_positions = slot_positions(length, slots)
    else:
        keys = jnp.concatenate([cache.keys, k.astype(cache.keys.dtype)], axis=1)
        values = jnp.concatenate([cache.values, v.astype(cache.values.dtype)], axis=1)
        fresh = jnp.where(valid, positions, -1)
        key_positions = jnp.concatenate([slot_positions(context.length, slots), fresh], axis=1)
    seen = key_positions[:, None]
    mask = (seen >= 0) & (seen <= positions[..., None]) & valid[..., None]
    if settings.window is not None:
        mask &= seen > positions[..., None] - settings.window
    sinks = None
    if sink_queries is not None:
        mask &= seen >= sink_slots
        visible = valid[..., None] & (jnp.arange(sink_slots) <= positions[..., None])
        sinks = SinkInputs(
            sink_queries, new_cache.sink_keys[:, None], new_cache.sink_values[:, None], visible
        )
    out = attend(
        q, keys, values, mask, scale=settings.scale, softcap=settings.softcap, sinks=sinks
    )
    return out, new_cache
