"""The DeltaProduct operator on rows whose tokens are divided among devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, SegmentIds
from tptt_jax.config import Precision
from tptt_jax.ops.context import CONTEXT_AXIS, from_shard_before, split_tokens
from tptt_jax.ops.delta_product.chunked import chunk_delta_product
from tptt_jax.ops.delta_product.inputs import compute_dtype, resolve_precision
from tptt_jax.ops.residuals import save_mixed


class _Shard(NamedTuple):
    """Inputs of one shard, with heads on their third axis."""

    q: Array  # [B, T, H, D]
    k: Array  # [B, T, K, N, D]
    v: Array  # [B, T, K, N, D]
    beta: Array  # [B, T, K, N] or [B, T, K, N, D]
    log_decay: Array | None
    segment_ids: Array | None


class Transition(NamedTuple):
    """What a part of a row does to the state: S becomes keep S + write.

    Attributes:
      keep: A [B, K, D, D]; zero where a document starts.
      write: B, the state that the part leaves behind an empty one [B, K, D, D].
    """

    keep: Float[Array, "B K D D"]
    write: Float[Array, "B K D D"]

    def after(self, before: "Transition") -> "Transition":
        """The transition of `before` and then this one."""
        return Transition(
            jnp.matmul(self.keep, before.keep, precision="highest"),
            self.write + jnp.matmul(self.keep, before.write, precision="highest"),
        )


def split_delta_product(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K D"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None = None,
    segment_ids: SegmentIds | None = None,
    *,
    chunk_size: int = 64,
    precision: Precision = "auto",
) -> Float[Array, "B T H D"]:
    """`chunk_delta_product` from an empty state, where rows are divided among devices.

    The recurrence is affine in the state. Each device runs its tokens twice at once, with their
    values from an empty state and without values from the identity; keys, scores and triangular
    systems are shared:

        S_out = A S_in + B,  o_t = o_t(S_in = 0) + r_t S_in

    S_in is the exclusive prefix scan of (A, B) over the devices, in log2(shards) exchanges
    (Hillis and Steele).

    Args:
      q: queries, see `chunk_delta_product`.
      k: keys.
      v: values, as wide as keys.
      beta: write gate.
      log_decay: forget gate, or None.
      segment_ids: document ids, or None.
      chunk_size: most tokens of a chunk.
      precision: of products.

    Returns:
      The output in q's dtype.
    """
    k, v, beta = (jnp.swapaxes(x, 2, 3) for x in (k, v, beta))
    shard = _Shard(q, k, v, beta, log_decay, segment_ids)
    return split_tokens(lambda shard: _run_shard(shard, chunk_size, precision), (shard,))


def _run_shard(x: _Shard, chunk_size: int, precision: Precision) -> Array:
    """The output of a shard [B, T, H, D]."""
    batch, tokens, heads, dim = x.q.shape
    k, v, beta = (jnp.swapaxes(y, 2, 3) for y in (x.k, x.v, x.beta))
    kv_heads, dtype = k.shape[3], compute_dtype(x.q, k, v, beta)

    def run(values: Array, state: Array) -> tuple[Array, Array]:
        return chunk_delta_product(
            x.q,
            k,
            values,
            beta,
            x.log_decay,
            state,
            x.segment_ids,
            chunk_size=chunk_size,
            precision=precision,
        )

    identity = jnp.broadcast_to(jnp.eye(dim, dtype=dtype), (batch, kv_heads, dim, dim))
    (own, read), (write, keep) = jax.vmap(run)(
        jnp.stack([v, jnp.zeros_like(v)]), jnp.stack([jnp.zeros_like(identity), identity])
    )
    if x.segment_ids is not None:
        # The operator treats a shard's first document as that of the incoming state, and resets
        # the state at all others.
        continues = _continues(x.segment_ids)[:, None, None, None]
        read, keep = jnp.where(continues, read, 0), jnp.where(continues, keep, 0)
    read, keep, write = (save_mixed(y) for y in (read, keep, write))
    state = incoming_state(Transition(keep, write))
    grouped = read.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    exact = resolve_precision(precision, x.q, k, v)
    missing = jnp.einsum("btkgd,bkde->btkge", grouped, state, precision=exact)
    return (own + missing.reshape(own.shape)).astype(own.dtype)


def _continues(segment_ids: Array) -> Array:
    """Whether a shard begins in the document that is open before it, or has none [B]."""
    last = jax.lax.all_gather(_first_valid(segment_ids[:, ::-1]), CONTEXT_AXIS, axis=1)
    earlier = jnp.arange(last.shape[1]) < jax.lax.axis_index(CONTEXT_AXIS)
    before = _first_valid(jnp.where(earlier, last, 0)[:, ::-1])
    first = _first_valid(segment_ids)
    return (first == 0) | (first == before)


def _first_valid(segment_ids: Array) -> Array:
    """The first id of each row that is not 0 [B]; 0: there is none."""
    place = jnp.argmax(segment_ids != 0, axis=1, keepdims=True)
    return jnp.take_along_axis(segment_ids, place, axis=1)[:, 0]


def incoming_state(own: Transition) -> Float[Array, "B K D D"]:
    """The state before each shard, inside of `split_tokens`; zero before the first."""
    hops, shards = 1, jax.lax.axis_size(CONTEXT_AXIS)
    while hops < shards - 1:
        # Zeros where no shard is that far back: nothing precedes a row.
        own = own.after(from_shard_before(own, hops))
        hops *= 2
    return from_shard_before(own.write)
