"""Write and forget gates computed from raw keys and values (TPTT, arXiv:2506.17671, eq. 3)."""

import functools
import math

import jax
import jax.numpy as jnp

from tptt_jax.array_checks import check_axes
from tptt_jax.array_typing import Array, Float, SegmentIds
from tptt_jax.config import Gate, Trick
from tptt_jax.ops.token_shift import shift_tokens
from tptt_jax.ops.virtual_tokens import expand_virtual_tokens


def causal_mean(
    x: Float[Array, "B T K D"], segment_ids: SegmentIds | None = None
) -> Float[Array, "B T K D"]:
    """Mean over the last three valid tokens of the document, its first token replicated.

    Args:
      x: raw keys or values [B, T, K, D].
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.

    Returns:
      The mean [B, T, K, D] in at least float32; padding keeps its own value.
    """
    check_axes("x", x, "B T K D")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    lag1, has_lag1 = shift_tokens(x, 1, segment_ids)
    lag2, has_lag2 = shift_tokens(x, 2, segment_ids)
    lag1 = jnp.where(has_lag1[:, :, None, None], lag1, x)
    lag2 = jnp.where(has_lag2[:, :, None, None], lag2, lag1)
    return (x + lag1 + lag2) / 3


def compute_gate(
    kind: Gate,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segment_ids: SegmentIds | None = None,
    vector: bool = False,
) -> Float[Array, "B T K"] | Float[Array, "B T K D"]:
    """Gate in (0, 1) for every token and KV head.

    "k" is sigmoid(causal_mean(k)), "v" the same of v, "kv" their product, "constant" 0.5.

    Args:
      kind: what the gate is computed from.
      k: raw keys [B, T, K, D].
      v: raw values [B, T, K, D].
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.
      vector: one gate per channel instead of their mean.

    Returns:
      The gate [B, T, K], or [B, T, K, D] if vector, in at least float32.

    Raises:
      ValueError: if the kind is unknown.
    """
    check_axes("k", k, "B T K D")
    check_axes("v", v, "B T K D")
    if kind == "constant":
        wide = jnp.promote_types(k.dtype, jnp.float32)
        return jnp.full(k.shape if vector else k.shape[:-1], 0.5, wide)
    gates = [jax.nn.sigmoid(mean) for mean in _gate_inputs(kind, k, v, segment_ids)]
    gate = functools.reduce(jnp.multiply, gates)
    return gate if vector else jnp.mean(gate, axis=-1)


def compute_beta(
    kind: Gate,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    num_householder: int,
    *,
    segment_ids: SegmentIds | None = None,
    vector: bool = False,
    trick: Trick | None = None,
) -> Float[Array, "B T N K"] | Float[Array, "B T N K D"]:
    """Write gate of every Householder step.

    Args:
      kind: what the gate is computed from, see `compute_gate`.
      k: raw keys [B, T, K, D].
      v: raw values [B, T, K, D].
      num_householder: N, steps per token.
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.
      vector: one gate per channel instead of their mean.
      trick: None repeats the gate for every step; otherwise the gate is expanded like keys
        are (the paper's text: a differenced gate turns negative and the state can grow).

    Returns:
      beta [B, T, N, K], or [B, T, N, K, D] if vector, in at least float32.

    Raises:
      ValueError: if the kind or the trick is unknown.
    """
    if trick is not None:
        gate = compute_gate(kind, k, v, segment_ids, vector=True)
        beta = expand_virtual_tokens(gate, num_householder, trick, segment_ids)
        return beta if vector else jnp.mean(beta, axis=-1)
    gate = compute_gate(kind, k, v, segment_ids, vector)
    return jnp.repeat(gate[:, :, None], num_householder, axis=2)


def compute_log_decay(
    kind: Gate,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segment_ids: SegmentIds | None = None,
) -> Float[Array, "B T K"] | None:
    """Logarithm of the scalar gate, finite however small the gate is.

    Args:
      kind: what the gate is computed from, see `compute_gate`.
      k: raw keys [B, T, K, D].
      v: raw values [B, T, K, D].
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.

    Returns:
      log_decay <= 0 [B, T, K] in at least float32; None for "constant": nothing is forgotten.

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind == "constant":
        return None
    logs = [jax.nn.log_sigmoid(mean) for mean in _gate_inputs(kind, k, v, segment_ids)]
    log_gate = functools.reduce(jnp.add, logs)
    log_mean = jax.nn.logsumexp(log_gate, axis=-1) - math.log(log_gate.shape[-1])
    # Rounding must not turn a gate of almost 1 into growth.
    return jnp.minimum(log_mean, 0)


def _gate_inputs(kind: Gate, k: Array, v: Array, segment_ids: SegmentIds | None) -> list[Array]:
    """The means [B, T, K, D] whose sigmoids, multiplied, are the vector gate."""
    if kind not in ("k", "v", "kv"):
        raise ValueError(f"gate must be one of k, v, kv, constant, got {kind!r}.")
    sources = [source for letter, source in (("k", k), ("v", v)) if letter in kind]
    return [causal_mean(source, segment_ids) for source in sources]
