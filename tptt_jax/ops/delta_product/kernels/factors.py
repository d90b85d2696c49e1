"""Decay factors between the tokens and the ends of a chunk, with document starts."""

from typing import NamedTuple

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.ops.delta_product.kernels.tiles import Cut


class Factors(NamedTuple):
    """Per token [B, K, T] or virtual token [B, K, V]; a chunk has C tokens, M virtual ones.

    Attributes:
      decay: logarithm of each virtual token's factor on everything written before it [V]; nonzero
        only for a token's first one. None: no decay.
      until_reads: sum of decays from the chunk's start to token t [T], or None.
      until_writes: the same to virtual token i [V], or None.
      into_reads: factor from the state before the chunk to token t [T].
      into_writes: factor from that state to virtual token i [V].
      out_of_writes: factor from virtual token i's write to the state after the chunk [V].
      through: factor from the state before a chunk to the state after it [B, K, n].
      read_documents: documents of tokens [B, T]; None: a row is one document.
      documents: of virtual tokens [B, V], or None.
    """

    decay: Float[Array, "B K V"] | None = None
    until_reads: Float[Array, "B K T"] | None = None
    until_writes: Float[Array, "B K V"] | None = None
    into_reads: Float[Array, "B K T"] | None = None
    into_writes: Float[Array, "B K V"] | None = None
    out_of_writes: Float[Array, "B K V"] | None = None
    through: Float[Array, "B K n"] | None = None
    read_documents: Int[Array, "B T"] | None = None
    documents: Int[Array, "B V"] | None = None


def make_factors(
    log_decay: Float[Array, "B K T"] | None,
    ordinals: Int[Array, "B T"] | None,
    kv_heads: int,
    cut: Cut,
) -> Factors:
    """The factors of rows of whole chunks.

    Args:
      log_decay: of each token [B, K, T], float32, or None.
      ordinals: number of each token's document [B, T], counted from 0, or None.
      kv_heads: K.
      cut: of the rows.

    Returns:
      All of them, or none if there is neither.
    """
    known = log_decay if log_decay is not None else ordinals
    if known is None:
        return Factors()
    batch, tokens = known.shape[0], known.shape[-1]
    chunks = (batch, kv_heads, tokens // cut.tokens, cut.tokens)

    def spread(x: Array) -> Array:
        return jnp.repeat(x.reshape(batch, kv_heads, tokens), cut.steps, axis=-1)

    factors = Factors()
    into = out = jnp.ones(chunks, jnp.float32)
    if log_decay is not None:
        by_chunk = log_decay.reshape(chunks)
        until = jnp.cumsum(by_chunk, axis=-1)
        # Sums over the tokens after this one.
        after = jnp.cumsum(by_chunk[..., :0:-1], axis=-1)[..., ::-1]
        into, out = jnp.exp(until), jnp.exp(jnp.pad(after, ((0, 0),) * 3 + ((0, 1),)))
        # A token decays the state before its first step.
        decay = jnp.pad(log_decay[..., None], ((0, 0),) * 3 + ((0, cut.steps - 1),))
        factors = Factors(
            decay=decay.reshape(batch, kv_heads, -1),
            until_reads=until.reshape(batch, kv_heads, tokens),
            until_writes=spread(until),
        )
    through = into[..., -1]
    if ordinals is not None:
        documents = ordinals.reshape(batch, 1, *chunks[2:])
        last = documents[..., -1]
        before = jnp.pad(last, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        into = jnp.where(documents == before[..., None], into, 0)
        out = jnp.where(documents == last[..., None], out, 0)
        through = jnp.where(last == before, through, 0)
        factors = factors._replace(
            read_documents=ordinals, documents=jnp.repeat(ordinals, cut.steps, axis=1)
        )
    return factors._replace(
        into_reads=into.reshape(batch, kv_heads, tokens),
        into_writes=spread(into),
        out_of_writes=spread(out),
        through=through,
    )


def decay_gradient(
    of_reads: Float[Array, "B K T"],
    of_writes: Float[Array, "B K V"],
    of_ends: Float[Array, "B K n"],
    cut: Cut,
) -> Float[Array, "B K T"]:
    """The gradient of log_decay, given those of the sums of decays since a chunk's start.

    Everything a token's query and keys do depends on the sum G through exp(G) q, exp(G) beta k and
    exp(-G) k, so its gradient is <q, dq> + <beta k, d(beta k)> - <k, dk> over the parts of dk and
    d(beta k) that belong to those. (With sums over whole rows this is known from gated linear
    attention, arXiv:2312.06635; sums over a chunk keep rounding errors apart.)

    Args:
      of_reads: <q, dq> [B, K, T].
      of_writes: <beta k, d(beta k)> - <k, dk> [B, K, V].
      of_ends: <S, dS> of the states after the chunks [B, K, n], for the sums to their ends.
      cut: of the rows.
    """
    batch, kv_heads, tokens = of_reads.shape
    of_sums = of_reads + jnp.sum(of_writes.reshape(batch, kv_heads, tokens, cut.steps), axis=-1)
    of_sums = of_sums.reshape(batch, kv_heads, -1, cut.tokens)
    of_sums = of_sums.at[..., -1].add(of_ends)
    return jnp.cumsum(of_sums[..., ::-1], axis=-1)[..., ::-1].reshape(of_reads.shape)
