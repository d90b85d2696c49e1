"""Input checks and helpers that all forms of DeltaProduct share."""

from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from tptt_jax.array_checks import check_arrays, check_axes
from tptt_jax.array_typing import Array, Bool, Float, State

_Tree = TypeVar("_Tree")


def check_inputs(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
) -> None:
    """Raises ValueError if the arguments of an operator do not fit together.

    TypeError if one of them is not an array.

    Args:
      q: queries, must be [B, T, H, D].
      k: keys, must be [B, T, N, K, D] with H a multiple of K.
      v: values, must be [B, T, N, K, Dv].
      beta: write gate, must be [B, T, N, K], or [B, T, N, K, D] if Dv = D.
      log_decay: None or [B, T, K].
      initial_state: None or [B, K, D, Dv].
      segment_ids: None or integers [B, T].
    """
    check_arrays(
        q=q,
        k=k,
        v=v,
        beta=beta,
        log_decay=log_decay,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    check_axes("q", q, "B T H D")
    if k.ndim != 5:
        raise ValueError(
            f"k must have 5 axes ([B, T, N, K, D]; add the step axis with k[:, :, None] for "
            f"N = 1), got shape {k.shape}."
        )
    batch, length, heads, dim = q.shape
    steps, kv_heads = k.shape[2:4]
    _check_shape("k", k, (batch, length, steps, kv_heads, dim), "[B, T, N, K, D]")
    if steps < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"k must have at least one step and q heads in a multiple of its heads, got N = "
            f"{steps}, H = {heads} and K = {kv_heads}."
        )
    value_dim = v.shape[-1] if v.ndim else 0
    _check_shape("v", v, (*k.shape[:4], value_dim), "[B, T, N, K, Dv]")
    if beta.ndim == 5:
        _check_shape("beta", beta, k.shape, "[B, T, N, K, D] if per channel")
        if value_dim != dim:
            raise ValueError(
                f"beta per channel needs values as wide as keys (D = {dim}), got Dv = "
                f"{value_dim}; use a beta of shape {k.shape[:4]} ([B, T, N, K])."
            )
    else:
        _check_shape("beta", beta, k.shape[:4], "[B, T, N, K]")
    if log_decay is not None:
        _check_shape("log_decay", log_decay, (batch, length, kv_heads), "[B, T, K]")
    if initial_state is not None:
        state_shape = (batch, kv_heads, dim, value_dim)
        _check_shape("the state", initial_state, state_shape, "[B, K, D, Dv]")
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, (batch, length), "[B, T]")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids must be integers (0 = padding), got {segment_ids.dtype}; "
                f"use segment_ids.astype(jnp.int32)."
            )


def _check_shape(name: str, x: Array, expected: tuple[int, ...], axes: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected} ({axes}), got {x.shape}.")


def check_activation(state_activation: str) -> None:
    """Raises ValueError if the activation of the state is unknown."""
    if state_activation not in ("none", "gelu"):
        raise ValueError(f"state_activation must be one of none, gelu, got {state_activation!r}.")


def compute_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype to compute and to keep the state in: float32, or float64 if an input is."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def resolve_precision(
    precision: jax.lax.PrecisionLike | Literal["auto"], *arrays: Array
) -> jax.lax.PrecisionLike:
    """Resolves "auto": products as exact as their operands.

    Args:
      precision: "auto" becomes "default" if all arrays have half precision, else "highest".
      *arrays: inputs of the operator that are multiplied.
    """
    if precision != "auto":
        return precision
    half = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in arrays)
    return "default" if half else "highest"


def is_default_precision(precision: jax.lax.PrecisionLike) -> bool:
    """Whether products may have the machine's default precision.

    Args:
      precision: of products.
    """
    return precision in (None, "default", jax.lax.Precision.DEFAULT)


def silence_padding(valid: Bool[Array, "..."], arrays: _Tree) -> _Tree:
    """A tree of arrays, whose leading axes are those of `valid`, with zeros where it is False.

    Previous values there, NaN included, have no effect.
    """

    def silence(x):
        return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, 0)

    return jax.tree.map(silence, arrays)


def activate_state(state: State) -> Float[Array, "B K D Dv"]:
    """S/2 * gelu(2 S / (|S| + 1e-6)), |S| the norm of each row (TPTT eq. 8).

    Args:
      state: memory [B, K, D, Dv]; the norm is over the last axis.

    Returns:
      The activated state, like `state`.
    """
    square = jnp.sum(state * state, axis=-1, keepdims=True)
    # The square root has no gradient at 0, where a memory starts.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return state / 2 * jax.nn.gelu(2 * state / (norm + 1e-6), approximate=True)
