"""Softmax attention on rows whose tokens are divided among devices."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Float, Int, SegmentIds
from tptt_jax.ops.attention.blocks import Attended
from tptt_jax.ops.attention.rows import attend_sequence
from tptt_jax.ops.attention.sinks import document_sinks
from tptt_jax.ops.context import CONTEXT_AXIS, split_tokens, with_tokens_before, with_whole_row
from tptt_jax.ops.documents import segment_starts


class _Shard(NamedTuple):
    """Arrays of one shard, and places of its documents' first tokens in the whole row."""

    q: Array
    k: Array
    v: Array
    ids: Array
    starts: Array
    sink_queries: Array | None


class _Options(NamedTuple):
    """Settings that all shards share."""

    window: int | None
    num_sinks: int
    scale: float
    softcap: float | None


def attend_split(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    segment_ids: SegmentIds | None = None,
    window: int | None = None,
    narrower: Int[Array, ""] | None = None,
    sink_queries: Float[Array, "B T H D"] | None = None,
    num_sinks: int = 0,
    scale: float,
    softcap: float | None = None,
) -> Attended:
    """`attend_sequence` where rows are divided among devices.

    Each device fetches the `window` keys and values before its own, and the sinks of the document
    that it begins in; without a window those of the whole row.

    Args:
      q: rotated queries.
      k: rotated keys.
      v: values.
      segment_ids: documents; None: one per row.
      window: tokens seen, the current one included; None: all before.
      narrower: a traced window of at most `window`; None: `window`.
      sink_queries: queries for the sinks; None: no sinks.
      num_sinks: first tokens of each document that stay visible.
      scale: factor on the logits.
      softcap: see `attend`.

    Returns:
      As `attend_sequence`.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    shard = _Shard(q, k, v, segment_ids, segment_starts(segment_ids), sink_queries)
    options = _Options(window, num_sinks, scale, softcap)

    run = functools.partial(_attend_shard, options)
    return split_tokens(run, (shard,), (narrower,))


def _attend_shard(options: _Options, x: _Shard, narrower: Array | None) -> Attended:
    """Attention of the queries of a shard."""
    size, shards = x.q.shape[1], lax.axis_size(CONTEXT_AXIS)
    first = lax.axis_index(CONTEXT_AXIS) * size
    fetch = with_whole_row
    if options.window is not None:
        before = min(options.window, size * (shards - 1))
        fetch = functools.partial(with_tokens_before, count=before)
    # In front of the row ids are 0, as of padding.
    keys, values, ids = (fetch(y) for y in (x.k, x.v, x.ids))
    sinks = None
    if x.sink_queries is not None:
        fetch = functools.partial(_carried_sinks, starts=x.starts, count=options.num_sinks)
        sinks = document_sinks(
            x.k,
            x.v,
            x.sink_queries,
            x.starts - first,
            x.ids != 0,
            options.num_sinks,
            (fetch(x.k), fetch(x.v)),
        )
    return attend_sequence(
        x.q,
        keys,
        values,
        segment_ids=ids,
        starts=x.starts - first,
        window=options.window,
        narrower=narrower,
        sinks=sinks,
        scale=options.scale,
        softcap=options.softcap,
    )


def _carried_sinks(x: Array, starts: Array, count: int) -> Array:
    """Keys or values [B, Z, K, D] of the sinks of the document that this shard begins in."""
    size = x.shape[1]
    places = lax.all_gather(starts[:, 0], CONTEXT_AXIS)[..., None] + jnp.arange(count)  # [n, B, Z]
    own = places - lax.axis_index(CONTEXT_AXIS) * size
    rows = jnp.arange(x.shape[0])[:, None]
    found = x[rows, jnp.clip(own, 0, size - 1)]
    is_own = ((own >= 0) & (own < size))[..., None, None]
    return lax.psum_scatter(jnp.where(is_own, found, 0), CONTEXT_AXIS)
