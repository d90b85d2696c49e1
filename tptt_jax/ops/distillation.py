"""Kullback-Leibler divergence between two predictions of a large vocabulary, block by block."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float, Hidden
from tptt_jax.ops.attention.softcap import softcap_slope
from tptt_jax.ops.cross_entropy import LOGITS_AT_A_TIME
from tptt_jax.ops.devices import PerPlatform, run_per_platform
from tptt_jax.ops.lm_head import dense_rows, head_logits, head_product
from tptt_jax.ops.quantization import QuantizedArray, Weight, dense, slice_weight

# Two blocks of logits that stay in a CPU's cache: 8 MiB each.
_CACHED_LOGITS = 1 << 21


class _Sums(NamedTuple):
    """Running sums of one model's exponentials, relative to the largest logit so far."""

    top: Array  # [...]
    total: Array  # [...]
    weighted: Array  # [..., E]: sum of exponential times row of the head


class _Plan(NamedTuple):
    """Static side: soft cap of the logits, axis of the vocabulary, entries in a block."""

    softcap: float | None
    vocab_axis: int
    block: int


def token_divergence(
    hidden: Hidden,
    teacher_hidden: Hidden,
    head: Float[Array, "V E"] | Float[Array, "E V"] | QuantizedArray,
    *,
    softcap: float | None = None,
    vocab_axis: int = 0,
    vocab_at_a_time: int | None = None,
) -> Float[Array, "B T"]:
    """KL(teacher || student) of every token's prediction, both by the same head.

    The gradient for `hidden` is head^T (p_student - p_teacher); it is summed in the same pass over
    the vocabulary as the loss, as `token_cross_entropy` does it. The teacher and the head get none.

    Args:
      hidden: of the student [B, T, E].
      teacher_hidden: [B, T, E].
      head: [V, E], or [E, V] with vocab_axis 1, in any float dtype or quantised.
      softcap: logits x become softcap * tanh(x / softcap).
      vocab_axis: of the head.
      vocab_at_a_time: entries in a block; None: what suits the backend.

    Returns:
      Nats, float32 [B, T].
    """
    batch, tokens, _ = hidden.shape

    def plan(room: int) -> _Plan:
        block = vocab_at_a_time
        if block is None:
            block = max(1024, 1 << (room // max(batch * tokens, 1)).bit_length())
        return _Plan(softcap, vocab_axis, min(block, dense_rows(head, vocab_axis)))

    plans = PerPlatform(cpu=plan(_CACHED_LOGITS), other=plan(LOGITS_AT_A_TIME))
    return _divergence(hidden, teacher_hidden, head, plans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _divergence(hidden: Array, teacher: Array, head: Weight, plans: PerPlatform) -> Array:
    return run_per_platform(_run, plans, hidden, teacher, head)[0]


def _forward(
    hidden: Array, teacher: Array, head: Weight, plans: PerPlatform
) -> tuple[Array, Array]:
    return run_per_platform(_run, plans, hidden, teacher, head)


def _backward(plans: PerPlatform, gradient: Array, scale: Array) -> tuple:
    return gradient * scale[..., None].astype(gradient.dtype), None, None


_divergence.defvjp(_forward, _backward)


def _run(plan: _Plan, hidden: Array, teacher: Array, head: Weight) -> tuple[Array, Array]:
    """Divergences [B, T] and their gradients for `hidden` [B, T, E]."""
    vocab = head.shape[plan.vocab_axis]
    zeros = jnp.zeros(hidden.shape, jnp.float32)
    empty = _Sums(jnp.full(hidden.shape[:2], -jnp.inf), zeros[..., 0], zeros)

    def visit(number: Array, carry: tuple) -> tuple:
        mine, theirs, gaps = carry
        # The last block goes back over entries that have been counted already.
        first = jnp.minimum(number * plan.block, vocab - plan.block)
        piece = slice_weight(head, first, plan.block, plan.vocab_axis)
        piece = dense(piece, hidden.dtype)
        piece = piece if plan.vocab_axis == 0 else piece.T
        fresh = None
        if vocab % plan.block:
            fresh = first + jnp.arange(plan.block) >= number * plan.block
        student, target = (head_logits(x, piece, plan.softcap) for x in (hidden, teacher))
        slope = softcap_slope(student, plan.softcap)
        mine, _, _ = _add(mine, student, slope, piece, fresh, hidden.dtype)
        # The teacher's exponentials meet the student's slope: it is the student's gradient.
        theirs, weights, shrink = _add(theirs, target, slope, piece, fresh, hidden.dtype)
        gaps = gaps * shrink + jnp.einsum("btv,btv->bt", weights, target - student)
        return mine, theirs, gaps

    blocks = -(-vocab // plan.block)
    mine, theirs, gaps = lax.fori_loop(0, blocks, visit, (empty, empty, zeros[..., 0]))
    losses = gaps / theirs.total - _log_total(theirs) + _log_total(mine)
    gradient = mine.weighted / mine.total[..., None] - theirs.weighted / theirs.total[..., None]
    return losses, gradient.astype(hidden.dtype)


def _add(
    sums: _Sums,
    logits: Array,
    slope: Array | float,
    piece: Array,
    fresh: Array | None,
    dtype: DTypeLike,
) -> tuple[_Sums, Array, Array]:
    """The sums with a block of logits, its exponentials, and the factor on what was summed."""
    if fresh is not None:
        logits = jnp.where(fresh, logits, -jnp.inf)
    top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
    shrink = jnp.exp(sums.top - top)
    weights = jnp.exp(logits - top[..., None])
    rows = head_product((weights * slope).astype(dtype), piece, 1)
    total = sums.total * shrink + jnp.sum(weights, axis=-1)
    weighted = sums.weighted * shrink[..., None] + rows.astype(jnp.float32)
    return _Sums(top, total, weighted), weights, shrink


def _log_total(sums: _Sums) -> Array:
    return sums.top + jnp.log(sums.total)
