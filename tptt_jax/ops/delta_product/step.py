"""The DeltaProduct memory for decoding: one token at a time."""

import jax.numpy as jnp

from tptt_jax.array_checks import check_arrays, check_axes
from tptt_jax.array_typing import Array, Float, State
from tptt_jax.ops.delta_product.inputs import check_inputs, compute_dtype


def step_delta_product(
    q: Float[Array, "B H D"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K Dv"],
    beta: Float[Array, "B N K"] | Float[Array, "B N K D"],
    state: State,
    log_decay: Float[Array, "B K"] | None = None,
) -> tuple[Float[Array, "B H Dv"], State]:
    """Runs the DeltaProduct recurrence for one token, see `chunk_delta_product`.

    Args:
      q: query [B, H, D].
      k: keys [B, N, K, D].
      v: values [B, N, K, Dv].
      beta: write gate [B, N, K], or [B, N, K, D] per channel (needs Dv = D).
      state: memory before the token [B, K, D, Dv].
      log_decay: logarithm <= 0 of the forget gate [B, K]; None: nothing is forgotten.

    Returns:
      Output [B, H, Dv] in q's dtype, and the new state [B, K, D, Dv] in float32 (float64 if
      an input is).

    Raises:
      TypeError: if an argument is not an array.
      ValueError: if the shapes disagree.
    """
    check_arrays(k=k, v=v, beta=beta, state=state, log_decay=log_decay)
    check_axes("q (of one token)", q, "B H D")
    decay = log_decay if log_decay is None else log_decay[:, None]
    check_inputs(q[:, None], k[:, None], v[:, None], beta[:, None], decay, state)
    dtype = compute_dtype(q, k, v, beta)
    state, k, v, beta = (x.astype(dtype) for x in (state, k, v, beta))
    beta = beta if beta.ndim == 4 else beta[..., None]
    if log_decay is not None:
        state = state * jnp.exp(log_decay.astype(dtype))[..., None, None]
    for key, value, gate in zip(*(jnp.moveaxis(x, 1, 0) for x in (k, v, beta)), strict=True):
        read = jnp.einsum("bkde,bkd->bke", state, gate * key, precision="highest")
        state = state + key[..., :, None] * (gate * value - read)[..., None, :]
    batch, heads, dim = q.shape
    grouped = q.astype(dtype).reshape(batch, k.shape[2], -1, dim)
    out = jnp.einsum("bkde,bkgd->bkge", state, grouped, precision="highest")
    return out.reshape(batch, heads, -1).astype(q.dtype), state
