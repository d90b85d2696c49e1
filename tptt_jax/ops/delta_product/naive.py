"""The DeltaProduct recurrence token by token: slow, obvious, and the oracle of the tests."""

from typing import Literal

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, SegmentIds, State
from tptt_jax.ops.delta_product.inputs import (
    activate_state,
    check_activation,
    check_inputs,
    compute_dtype,
    silence_padding,
)
from tptt_jax.ops.documents import document_ordinals
from tptt_jax.ops.manual_axes import vary_along, varying_axes


def naive_delta_product(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None = None,
    initial_state: State | None = None,
    segment_ids: SegmentIds | None = None,
    state_activation: Literal["none", "gelu"] = "none",
    activate_after: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H Dv"], State]:
    """Runs the DeltaProduct recurrence one token after the other.

    For every token t and step j = 1..N, with one state S per KV head:

        S <- exp(log_decay_t) S                     once per token, before step 1
        r = beta_tj v_tj - S^T (beta_tj k_tj)
        S <- S + k_tj r^T
        o_t = S^T q_t                               after step N, for each query head

    Computes in float32, or in float64 if an input is float64. `chunk_delta_product` gives
    the same results faster and describes the arguments; the one that differs is
    `activate_after`, which stands for its chunk boundaries.

    Args:
      q: queries [B, T, H, D].
      k: keys [B, T, N, K, D].
      v: values [B, T, N, K, Dv].
      beta: write gate [B, T, N, K], or [B, T, N, K, D] per channel.
      log_decay: logarithm <= 0 of the forget gate [B, T, K].
      initial_state: memory before the row's first document [B, K, D, Dv]; None: zeros.
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.
      state_activation: non-linearity on the state.
      activate_after: after which tokens to apply it [B, T]; "gelu" needs it.

    Returns:
      Output [B, T, H, Dv] in q's dtype, and the final state [B, K, D, Dv].

    Raises:
      ValueError: if the shapes disagree or activate_after is missing.
    """
    check_inputs(q, k, v, beta, log_decay, initial_state, segment_ids)
    check_activation(state_activation)
    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    if state_activation == "none":
        activate_after = jnp.zeros((batch, length), bool)
    elif activate_after is None or activate_after.shape != (batch, length):
        raise ValueError(
            f'state_activation="gelu" needs activate_after of shape {(batch, length)} ([B, T]), '
            f"got {None if activate_after is None else activate_after.shape}."
        )
    dtype = compute_dtype(q, k, v, beta)
    state = jnp.zeros((batch, kv_heads, dim, value_dim), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    state = vary_along(state, varying_axes(q, k, v, beta, log_decay, state, segment_ids))
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, kv_heads), dtype)
    restarts = jnp.zeros((batch, length), bool)
    xs = (q, k, v, beta if beta.ndim == 5 else beta[..., None], log_decay)
    if segment_ids is not None:
        xs = silence_padding(segment_ids != 0, xs)
        restarts = jnp.diff(document_ordinals(segment_ids), axis=1, prepend=0) > 0

    def advance(state, token):
        (q, k, v, beta, log_decay), restart, activate = token
        state = jnp.where(restart[:, None, None, None], 0, state)
        state = state * jnp.exp(log_decay)[:, :, None, None]
        for step in range(k.shape[1]):
            key, value, gate = k[:, step], v[:, step], beta[:, step]
            read = jnp.einsum("bkde,bkd->bke", state, gate * key, precision="highest")
            state = state + key[..., :, None] * (gate * value - read)[..., None, :]
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        out = jnp.einsum("bkde,bkgd->bkge", state, grouped, precision="highest")
        state = jnp.where(activate[:, None, None, None], activate_state(state), state)
        return state, out.reshape(batch, heads, value_dim)

    by_token = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (tuple(x.astype(dtype) for x in xs), restarts, activate_after),
    )
    state, out = jax.lax.scan(advance, state, by_token)
    return jnp.moveaxis(out, 0, 1).astype(q.dtype), state
