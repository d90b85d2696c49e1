"""The softmax branch: rotary embedding, windows with sinks, the KV cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
from tptt_jax.ops.attention import (
    Attended,
    KeyValues,
    attend,
    attend_sequence,
    attend_split,
    can_fuse,
    document_sinks,
    fused_attention,
    row_sinks,
)
from tptt_jax.ops.attention.rope import (
    RotaryAngles,
    invert_rotation,
    rotary_angles,
    rotate,
)
from tptt_jax.ops.context import is_split
from tptt_jax.ops.documents import document_lengths, segment_starts

# Logits that cached attention holds at a time: 128 MiB in float32.
_LOGITS_AT_A_TIME = 1 << 25


class TokenContext(NamedTuple):
    """Per-call information about tokens for all layers of one kind.

    Attributes:
      positions: within the document [B, T].
      segment_ids: [B, T], 0 = padding; None: one document per row, no padding.
      length: tokens of each row before this call [B]; None without a cache.
      angles: rotation of every token; None: positions are in the embeddings.
      sink_angles: rotation of queries for the sinks; None without sinks.
      window: tokens that softmax attention sees, where a call chooses fewer than the layer's
        window; None: the layer's window.
      evicted_angles: rotation back of the token that leaves the window at each place, with a
        cache; None: nothing leaves, or positions are in the embeddings.
    """

    positions: Positions
    segment_ids: SegmentIds | None
    length: Int[Array, "B"] | None
    angles: RotaryAngles | None
    sink_angles: RotaryAngles | None
    window: Int[Array, ""] | None = None
    evicted_angles: RotaryAngles | None = None

    def never_evicts(self, window: int | None) -> bool:
        """Whether the rows are too short for any token to leave a window."""
        if window is None:
            return True
        is_narrowed = self.window is not None
        return self.length is None and not is_narrowed and self.positions.shape[1] <= window

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """False on padding."""
        if self.segment_ids is None:
            return jnp.ones(self.positions.shape, bool)
        return self.segment_ids != 0


class SoftmaxSettings(NamedTuple):
    """The static side of softmax attention in layers of one kind."""

    window: int | None
    sinks: int
    scale: float
    softcap: float | None
    needs_mass: bool = False


def softmax_settings(
    config: ModelConfig, liza: LizaConfig | None, kind: LayerKind
) -> SoftmaxSettings:
    """The settings of layers of this kind from `config` and `liza`."""
    return SoftmaxSettings(
        softmax_window(config, liza, kind),
        num_sinks(config, liza, kind),
        config.attention_scale,
        config.attention.softcap,
        liza is not None and liza.mag == "mass" and liza.runs_memory(kind),
    )


def token_context(
    config: ModelConfig,
    liza: LizaConfig | None,
    kind: LayerKind,
    positions: Positions,
    segment_ids: SegmentIds | None,
    length: Int[Array, "B"] | None,
    window: Int[Array, ""] | None = None,
    text_length: int | None = None,
) -> TokenContext:
    """Computes the rotations that all layers of a kind share.

    Frequencies that depend on the length of a text are those of each document's whole length.
    With a cache that length is unknown: the frequencies of short texts are used (see
    `fix_context`).

    Args:
      config: of the model.
      liza: of its memory and window.
      kind: of the layers.
      positions: within the document [B, T].
      segment_ids: [B, T], 0 = padding; None: one document per row, no padding.
      length: tokens of each row before this call [B]; None without a cache.
      window: a window below the one that `liza` gives; None: that one.
      text_length: of all documents, where it is known before the call is compiled; None: it is
        found from positions and segment_ids.
    """
    widest = softmax_window(config, liza, kind)
    if kind == "sliding" or widest is None:
        window = None
    if config.position_embedding == "learned":
        return TokenContext(positions, segment_ids, length, None, None, window)
    rope, lengths = config.rope_of(kind), text_length
    if rope.depends_on_length and length is None and lengths is None:
        lengths = document_lengths(positions, segment_ids)
    rotations = functools.partial(
        rotary_angles, config=rope, head_dim=config.head_dim, lengths=lengths
    )
    sink_angles = evicted_angles = None
    seen = widest if window is None else window
    if seen is not None:
        if sinks := num_sinks(config, liza, kind):
            # Largest distance of a query from a sink, for documents of any length.
            sink_angles = rotations(jnp.minimum(positions, seen + sinks))
        if length is not None and liza is not None and liza.writes == "evicted":
            evicted_angles = invert_rotation(rotations(jnp.maximum(positions - seen, 0)), rope)
    angles = rotations(positions)
    return TokenContext(positions, segment_ids, length, angles, sink_angles, window, evicted_angles)


def apply_softmax(
    settings: SoftmaxSettings,
    context: TokenContext,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    cache: KeyValueCache | None = None,
) -> tuple[Attended, Float[Array, "B T K D"]]:
    """Rotates q and k, and attends to this call's tokens and to the cache.

    Args:
      settings: window and scale of the layer.
      context: of the tokens of this call.
      q: queries [B, T, H, D], after any q norm, not rotated.
      k: keys [B, T, K, D], likewise.
      v: values [B, T, K, D].
      cache: of the layer before this call; not changed, see `extend_cache`.

    Returns:
      Output [B, T, H, D] in q's dtype, zero on padding, and the log of the softmax's normaliser;
      and the rotated keys.
    """
    sink_queries = rotate(q, context.sink_angles) if settings.sinks else None
    keys = rotate(k, context.angles)
    if cache is not None:
        q = rotate(q, context.angles)
        return _attend_cached(settings, context, q, keys, v, cache, sink_queries), keys
    ids, window, softcap = context.segment_ids, settings.window, settings.softcap
    if context.never_evicts(window):
        sink_queries = None
    if is_split(k.shape[1]):
        out = attend_split(
            rotate(q, context.angles),
            keys,
            v,
            segment_ids=ids,
            window=window,
            narrower=context.window,
            sink_queries=sink_queries,
            num_sinks=settings.sinks,
            scale=settings.scale,
            softcap=softcap,
        )
        return out, keys
    sinks = None
    if sink_queries is not None:
        sinks = _sinks_of(context, sink_queries, keys, v, settings.sinks)
    # JAX rounds the normaliser of cuDNN's attention to half precision, which is too coarse for the
    # memory's share.
    needs_mass = settings.needs_mass or context.window is not None
    if not needs_mass and can_fuse(q, segment_ids=ids, sinks=sinks, softcap=softcap):
        q = rotate(q, context.angles)
        out = fused_attention(q, keys, v, segment_ids=ids, window=window, scale=settings.scale)
        return Attended(out, None), keys
    out = attend_sequence(
        q,
        k,
        v,
        angles=context.angles,
        segment_ids=ids,
        window=window,
        narrower=context.window,
        sinks=sinks,
        scale=settings.scale,
        softcap=softcap,
    )
    return out, keys


def extend_cache(
    context: TokenContext,
    cache: KeyValueCache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
) -> KeyValueCache:
    """The cache with the tokens of this call in it.

    Args:
      context: of the tokens.
      cache: before them.
      k: rotated keys [B, T, K, D].
      v: values [B, T, K, D].
    """
    assert context.length is not None
    place = (context.positions, context.valid)
    length = context.length + jnp.sum(context.valid, axis=1)
    return KeyValueCache(
        write_ring(cache.keys, k, *place, length),
        write_ring(cache.values, v, *place, length),
        write_sinks(cache.sink_keys, k, *place),
        write_sinks(cache.sink_values, v, *place),
    )


def _sinks_of(context: TokenContext, queries: Array, k: Array, v: Array, count: int) -> KeyValues:
    """The first `count` tokens of each token's own document."""
    if context.segment_ids is None:
        return row_sinks(k, v, queries, count)
    starts = segment_starts(context.segment_ids)
    return document_sinks(k, v, queries, starts, context.valid, count)


class _Queries(NamedTuple):
    """Arrays with an axis of queries, cut together when there are too many for one product."""

    q: Array
    positions: Array
    valid: Array
    sink_queries: Array | None


def _attend_cached(
    settings: SoftmaxSettings,
    context: TokenContext,
    q: Array,
    k: Array,
    v: Array,
    cache: KeyValueCache,
    sink_queries: Array | None,
) -> Attended:
    """Attends to the ring, the tokens of this call and the sinks from either.

    Queries are taken so many at a time that their logits fit a fixed space, however long
    the cache is.
    """
    assert context.length is not None
    place = (context.positions, context.valid)
    old = slot_positions(context.length, cache.keys.shape[1])
    new = jnp.where(context.valid, context.positions, -1)
    sinks = None
    if sink_queries is not None:
        sinks = (write_sinks(cache.sink_keys, k, *place), write_sinks(cache.sink_values, v, *place))

    window = settings.window if context.window is None else context.window

    def attend_block(queries: _Queries) -> Attended:
        parts = [
            KeyValues(cache.keys, cache.values, _visible(settings, window, queries, old)),
            KeyValues(k, v, _visible(settings, window, queries, new)),
        ]
        if sinks is not None:
            reached = jnp.arange(settings.sinks) <= queries.positions[..., None]
            mask = queries.valid[..., None] & reached
            parts.append(KeyValues(*sinks, mask, queries.sink_queries))
        return attend(queries.q, parts, scale=settings.scale, softcap=settings.softcap)

    queries = _Queries(q, *place, sink_queries)
    batch, tokens, heads, _ = q.shape
    block = max(1, _LOGITS_AT_A_TIME // (batch * heads * (cache.keys.shape[1] + tokens)))
    if tokens <= block:
        return attend_block(queries)
    pad = -tokens % block
    blocks = lax.map(attend_block, jax.tree.map(lambda x: _cut(x, block, pad), queries))

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :tokens]

    return jax.tree.map(join, blocks)


def _visible(
    settings: SoftmaxSettings,
    window: int | Array | None,
    queries: _Queries,
    key_positions: Array,
) -> Array:
    """[B, T, S]: filled, not later, inside the window, and not a sink."""
    seen, query = key_positions[:, None], queries.positions[..., None]
    mask = (seen >= 0) & (seen <= query) & queries.valid[..., None]
    if window is not None:
        mask &= seen > query - window
    return mask if queries.sink_queries is None else mask & (seen >= settings.sinks)


def _cut(x: Array, size: int, pad: int) -> Array:
    """[B, n * size - pad, ...] -> [n, B, size, ...]; what is padded is not valid."""
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
