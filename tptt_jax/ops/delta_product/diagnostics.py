"""How far the recurrence forgets, and how close it is to blowing up."""

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, SegmentIds, State
from tptt_jax.ops.delta_product.triangular import invert_unit_lower


def half_life(log_decay: Float[Array, "B T K"] | None, valid: Bool[Array, "B T"]) -> Array:
    """Tokens after which the forget gate has halved a state: -ln 2 / mean log decay.

    Args:
      log_decay: of every token [B, T, K]; None: nothing is forgotten.
      valid: which tokens count [B, T].

    Returns:
      That of the median head, float32; infinite without forgetting.
    """
    if log_decay is None:
        return jnp.array(jnp.inf, jnp.float32)
    total = jnp.sum(jnp.where(valid[..., None], log_decay, 0), axis=(0, 1))
    lives = -jnp.log(2.0) * jnp.sum(valid) / jnp.minimum(total, -1e-30)
    return jnp.median(jnp.where(total < 0, lives, jnp.inf))


def relative_norm(
    state: State, v: Float[Array, "B T N K Dv"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """The largest |S|_F / (sqrt(D) rms |v|) of any head.

    D orthogonal keys whose values have this norm leave 1.

    Args:
      state: after the last token [B, K, D, Dv].
      v: the values [B, T, N, K, Dv].
      valid: which tokens count [B, T].

    Returns:
      float32; infinite for a state that is not finite.
    """
    squares = jnp.sum(jnp.square(v.astype(jnp.float32)), axis=-1)
    counted = jnp.sum(jnp.where(valid[..., None, None], squares, 0), axis=(0, 1, 2))
    mean = counted / jnp.maximum(jnp.sum(valid) * v.shape[2], 1)
    norms = jnp.sqrt(jnp.sum(jnp.square(state), axis=(-2, -1))) / jnp.sqrt(
        state.shape[-2] * jnp.maximum(mean, 1e-30)
    )
    return jnp.max(jnp.where(jnp.isfinite(norms), norms, jnp.inf)).astype(jnp.float32)


def chunk_condition(
    k: Float[Array, "B T N K D"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None,
    segment_ids: SegmentIds | None,
    chunk_size: int,
) -> Float[Array, ""]:
    """The largest condition number of a chunk's system I + L in `chunk_delta_product`.

    Args:
      k: unit keys [B, T, N, K, D].
      beta: write gates [B, T, N, K] or [B, T, N, K, D], 0 for tokens that are not written.
      log_decay: [B, T, K]; None: nothing is forgotten.
      segment_ids: documents [B, T]; None: one per row.
      chunk_size: tokens of a chunk; the whole chunks at a row's end are looked at.

    Returns:
      In the 1-norm, float32; infinite if the system is not finite.
    """
    batch, length, steps, heads = k.shape[:4]
    size = min(chunk_size, length)
    places = slice(length % size, None)

    def cut(x: Array) -> Array:
        """[B, T, N, K, D] -> [B, chunks, K, M, D]."""
        x = x[:, places].reshape(batch, -1, size * steps, heads, x.shape[-1])
        return jnp.moveaxis(x, 3, 2).astype(jnp.float32)

    def between_steps(x: Array) -> Array:
        """[..., C, C] of tokens -> [..., M, M] of their steps."""
        return jnp.repeat(jnp.repeat(x, steps, axis=-1), steps, axis=-2)

    keys, gates = cut(k), cut(beta if beta.ndim == 5 else beta[..., None])
    lower = jnp.matmul(gates * keys, jnp.swapaxes(keys, -1, -2), precision="highest")
    if log_decay is not None:
        sums = log_decay[:, places].reshape(batch, -1, size, heads).cumsum(axis=2)
        sums = jnp.moveaxis(sums, 3, 2)
        lower *= between_steps(jnp.exp(jnp.minimum(sums[..., :, None] - sums[..., None, :], 0)))
    if segment_ids is not None:
        ids = segment_ids[:, places].reshape(batch, -1, 1, size)
        lower = jnp.where(between_steps(ids[..., :, None] == ids[..., None, :]), lower, 0)
    lower = jnp.tril(lower, -1)
    system = lower + jnp.eye(size * steps)
    one_norms = [jnp.abs(x).sum(-2).max(-1) for x in (system, invert_unit_lower(lower))]
    condition = one_norms[0] * one_norms[1]
    return jnp.max(jnp.where(jnp.isfinite(condition), condition, jnp.inf))
