"""The DeltaProduct memory for sequences: parallel over chunks."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, SegmentIds, State
from tptt_jax.ops.delta_product.choice import check_kernels, choose_implementation
from tptt_jax.ops.delta_product.inputs import (
    check_activation,
    check_inputs,
    compute_dtype,
    resolve_precision,
    silence_padding,
)
from tptt_jax.ops.delta_product.plan import ChunkPlan, plan_chunks
from tptt_jax.ops.delta_product.scan import ChunkTerms, scan_chunks
from tptt_jax.ops.delta_product.triangular import invert_unit_lower
from tptt_jax.ops.devices import platform_of
from tptt_jax.ops.documents import document_ordinals
from tptt_jax.ops.manual_axes import vary_along, varying_axes
from tptt_jax.ops.residuals import scan_blocks


class _Chunks(NamedTuple):
    """Inputs cut into chunks; leading axes [blocks, B, n chunks, C] unless it says otherwise."""

    q: Array  # [..., H, D]
    k: Array  # [..., N, K, D]
    v: Array  # [..., N, K, Dv]
    beta: Array  # [..., N, K, 1] or [..., N, K, D]
    log_decay: Array | None  # [..., K]
    valid: Array | None  # [...]
    ordinals: Array | None  # [blocks, B, n, C + 1]: before the chunk, then of its tokens
    is_complete: Array | None  # [blocks, n]: whether the state is activated after the chunk


def chunk_delta_product(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None = None,
    initial_state: State | None = None,
    segment_ids: SegmentIds | None = None,
    chunk_size: int = 64,
    state_activation: Literal["none", "gelu"] = "none",
    precision: jax.lax.PrecisionLike | Literal["auto"] = "auto",
    implementation: Literal["xla", "pallas"] | None = None,
) -> tuple[Float[Array, "B T H Dv"], State]:
    """Runs the DeltaProduct recurrence in parallel chunks (arXiv:2502.10297; TPTT eq. 14).

    The same as `naive_delta_product`, by the WY form over the M = C * N virtual tokens of a
    chunk (G: running sum of log_decay inside the chunk):

        L = tril((beta K) K^T * exp(G_i - G_j), -1)
        (I + L) [W | U] = [beta K * exp(G) | beta V],  R = U - W S
        O = (Q * exp(G)) S + mask(Q K^T * exp(G_i - G_j)) R
        S <- exp(G_C) S + (K * exp(G_C - G))^T R

    Keep |k| <= 1 and 0 <= beta <= 2, then no step lets the state grow. Memory is linear in T;
    gradients recompute blocks of chunks.

    Args:
      q: queries [B, T, H, D]; head h reads the state of KV head h // (H / K).
      k: keys [B, T, N, K, D], L2-normalised.
      v: values [B, T, N, K, Dv].
      beta: write gate [B, T, N, K], or [B, T, N, K, D] per channel (needs Dv = D).
      log_decay: logarithm <= 0 of the forget gate [B, T, K]; None: nothing is forgotten.
      initial_state: memory before the row's first document [B, K, D, Dv]; None: zeros.
      segment_ids: document ids [B, T]. 0 is padding: it changes nothing and its output is 0,
        wherever it stands. A document ends, and the state is reset, where a different
        non-zero id comes. None: every row is one document.
      chunk_size: tokens per chunk at most, see `plan_chunks`; any T will do.
      state_activation: "gelu" applies `activate_state` after each complete chunk, counted
        from the start of the row: the only option whose result depends on chunk_size.
      precision: of the matrix products outside the triangular solve, which is always exact
        (kernels in bfloat16 round the inverse before they apply it). "auto": as exact as the
        inputs: "highest" (float32 on every backend), or "default" where q, k and v all have half
        precision.
      implementation: "xla" runs anywhere. "pallas" are kernels for NVIDIA GPUs (interpreted
        where there is none: slow, for tests); they choose their own chunk size and take neither
        float64, a state_activation, more than 4 Householder steps nor heads of more than 128
        channels; under `jax.shard_map` they work with check_vma=False only.
        None: the kernels where they were measured to be faster and, in a short trial of this
        process, compute the same, see `choose_implementation`.

    Returns:
      Output [B, T, H, Dv] in q's dtype, and the final state [B, K, D, Dv] in float32
      (float64 if an input is).

    Raises:
      ValueError: if the shapes disagree, an option is unknown, or "pallas" cannot do it.
    """
    check_inputs(q, k, v, beta, log_decay, initial_state, segment_ids)
    check_activation(state_activation)
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be xla, pallas or None, got {implementation!r}.")
    precision = resolve_precision(precision, q, k, v)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    dtype = compute_dtype(q, k, v, beta)
    state = jnp.zeros((batch, kv_heads, dim, value_dim), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    arrays = (q, k, v, beta, log_decay, state, segment_ids)
    axes = varying_axes(*arrays)
    q, k, v, beta, log_decay, state, segment_ids = vary_along(arrays, axes)
    if implementation is None and state_activation == "none":
        implementation = choose_implementation(q, k, v, beta, log_decay, segment_ids, precision)
    if implementation == "pallas":
        check_kernels(q, k, v, beta, state_activation)
        # Imported lazily: only GPUs need Pallas.
        from tptt_jax.ops.delta_product.kernel import kernel_delta_product

        return kernel_delta_product(q, k, v, beta, log_decay, state, segment_ids, precision)
    plan = plan_chunks(
        length, chunk_size, exact=state_activation != "none", platform=platform_of(q, k, v)
    )
    chunks = _cut_chunks(q, k, v, beta, log_decay, segment_ids, plan)
    if state_activation == "gelu":
        _, blocks, n = plan
        is_complete = jnp.arange(1, blocks * n + 1) * chunk_size <= length
        chunks = chunks._replace(is_complete=is_complete.reshape(blocks, n))
    run_block = functools.partial(_run_block, dtype=dtype, precision=precision)
    state, out = scan_blocks(run_block, state, chunks)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, value_dim)
    return out[:, :length], state


def _cut_chunks(q, k, v, beta, log_decay, segment_ids, plan: ChunkPlan) -> _Chunks:
    """Pads the tokens with inert ones to whole blocks of chunks."""
    batch, length = q.shape[:2]
    size, blocks, n = plan

    def cut(x, pad_mode="constant"):
        margin = ((0, 0), (0, blocks * n * size - length)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, margin, mode=pad_mode) if margin[1][1] else x
        return jnp.moveaxis(x.reshape(batch, blocks, n, size, *x.shape[2:]), 1, 0)

    valid = ordinals = None
    if segment_ids is not None:
        valid = cut(segment_ids != 0)
        # Filler tokens beyond the row's end must not start a document.
        ordinals = cut(document_ordinals(segment_ids), "edge" if length else "constant")
        last = jnp.moveaxis(ordinals[..., -1], 0, 1).reshape(batch, -1)
        before = jnp.pad(last, ((0, 0), (1, 0)))[:, :-1].reshape(batch, blocks, n, 1)
        ordinals = jnp.concatenate([jnp.moveaxis(before, 1, 0), ordinals], axis=-1)
    return _Chunks(
        q=cut(q),
        k=cut(k),
        v=cut(v),
        beta=cut(beta if beta.ndim == 5 else beta[..., None]),
        log_decay=None if log_decay is None else cut(log_decay),
        valid=valid,
        ordinals=ordinals,
        is_complete=None,
    )


def _arrange_chunks(chunks: _Chunks, dtype) -> _Chunks:
    """One block's chunks with the tokens inside, in the dtype to compute in.

    q becomes [n, B, K, G * C, D] (the query heads of a group one after the other), k, v and
    beta [n, B, K, M, D], log_decay [n, B, K, C] and ordinals [n, B, 1, C + 1].
    """
    batch, n, _, _, kv_heads, _ = chunks.k.shape
    *arrays, valid, ordinals, is_complete = chunks
    if valid is not None:
        arrays = silence_padding(valid, arrays)
    q, k, v, beta, log_decay = jax.tree.map(lambda x: x.astype(dtype), arrays)
    q = jnp.transpose(q, (1, 0, 3, 2, 4)).reshape(n, batch, kv_heads, -1, q.shape[-1])
    k, v, beta = (jnp.transpose(x, (1, 0, 4, 2, 3, 5)) for x in (k, v, beta))
    q, k, v, beta = (x.reshape(*x.shape[:3], -1, x.shape[-1]) for x in (q, k, v, beta))
    if log_decay is not None:
        log_decay = jnp.transpose(log_decay, (1, 0, 3, 2))
    if ordinals is not None:
        ordinals = jnp.swapaxes(ordinals, 0, 1)[:, :, None]
    return _Chunks(q, k, v, beta, log_decay, valid, ordinals, is_complete)


def _run_block(state, chunks: _Chunks, dtype, precision):
    """Runs n chunks: everything independent of the state at once, then a scan over the state."""
    matmul = functools.partial(jnp.matmul, precision=precision)
    batch, n, tokens, heads, _ = chunks.q.shape
    out_dtype = chunks.q.dtype
    chunks = _arrange_chunks(chunks, dtype)
    q, k, v, beta = chunks[:4]
    pair, carried = _decay_factors(chunks.log_decay, chunks.ordinals, tokens, dtype)
    steps, groups = k.shape[-2] // tokens, q.shape[-2] // tokens

    pair = jnp.repeat(pair, steps, axis=-1)
    k_transposed = jnp.swapaxes(k, -1, -2)
    scores = matmul(q, k_transposed) * jnp.tile(pair, (groups, 1))
    pair = jnp.repeat(pair, steps, axis=-2)
    # A gate per head scales rows after they were multiplied, once; one per channel the keys.
    gate = beta[..., 0] if beta.shape[-1] == 1 else None
    if gate is None:
        lower, key_in, value = matmul(beta * k, k_transposed) * pair, beta * k, beta * v
    else:
        lower, key_in, value = scale_rows(matmul(k, k_transposed) * pair, gate), k, v
    query_in, key_out, keep = q, k, None
    if carried is not None:
        carry_in, carry_out = carried
        key_in = key_in * jnp.repeat(carry_in, steps, axis=-1)[..., None]
        query_in = q * jnp.tile(carry_in, groups)[..., None]
        key_out = k * jnp.repeat(carry_out, steps, axis=-1)[..., None]
        keep = jnp.broadcast_to(carry_in[..., -1, None, None], (*k.shape[:-2], 1, 1))
    # The scan sees L only as the receiver of a gradient.
    inverse = jax.lax.stop_gradient(invert_unit_lower(lower))
    terms = ChunkTerms(
        key_in=key_in,
        query_in=query_in,
        key_out=key_out,
        scores=scores,
        value=value,
        lower=lower,
        inverse=inverse,
        gate=gate,
        keep=keep,
        is_complete=chunks.is_complete,
    )
    state, out = scan_chunks(state, terms, precision)
    out = out.astype(out_dtype).reshape(n, batch, heads, tokens, -1)
    return state, jnp.transpose(out, (1, 0, 3, 2, 4))


@jax.custom_vjp
def scale_rows(x: Float[Array, "... M X"], factor: Float[Array, "... M"]) -> Array:
    """Multiplies every row by its factor.

    The gradient for the factor is a sum of products; XLA's program for it on CPU is fast only
    if it is written as a contraction.
    """
    return x * factor[..., None]


def _scale_forward(x: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
    return scale_rows(x, factor), (x, factor)


def _scale_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, factor = kept
    products = jnp.einsum("...mx,...mx->...m", gradient, x, precision="highest")
    return gradient * factor[..., None], products


scale_rows.defvjp(_scale_forward, _scale_backward)


def _decay_factors(decay, ordinals, tokens, dtype) -> tuple[Array, tuple[Array, Array] | None]:
    """Factors from decay and document starts, all in [0, 1].

    Only exponents <= 0 are exponentiated.

    Returns:
      From token j to token i [n, B, K or 1, C, C], or [C, C] without decay and documents; and,
      with them, from the state before the chunk to token i and from token j to the state after
      it, each [n, B, K or 1, C].
    """
    if decay is None and ordinals is None:
        return jnp.tri(tokens, dtype=dtype), None
    # From every token, and in column 0 from before the chunk, to every token at or after it.
    connected = jnp.tril(jnp.ones((tokens, tokens + 1), bool), 1)
    log_factor = jnp.zeros((), dtype)
    if decay is not None:
        # Sums over the tokens in between: a difference of running sums would lose the small
        # decays after a large one. exp(-1000) is 0, and 0 * -inf would be NaN.
        addends = jnp.where(
            jnp.tri(tokens, tokens + 1, dtype=bool), jnp.maximum(decay, -1000)[..., None], 0
        )
        log_factor = jnp.matmul(jnp.tri(tokens, dtype=dtype), addends, precision="highest")
    if ordinals is not None:
        connected = connected & (ordinals[..., 1:, None] == ordinals[..., None, :])
    factor = jnp.exp(jnp.where(connected, log_factor, -jnp.inf))
    return factor[..., 1:], (factor[..., 0], factor[..., -1, 1:])
