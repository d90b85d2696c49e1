"""Cross-entropy of a large vocabulary that never holds all of its logits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from tptt_jax.array_typing import Array, Bool, Float, Hidden, Int
from tptt_jax.ops.attention.softcap import apply_softcap, softcap_slope
from tptt_jax.ops.context import num_shards, rows_as_shards, shards_as_rows
from tptt_jax.ops.counted_tokens import map_counted
from tptt_jax.ops.devices import PerPlatform, run_per_platform
from tptt_jax.ops.lm_head import dense_rows, head_logits, head_product
from tptt_jax.ops.placement import constrain_lookup
from tptt_jax.ops.quantization import QuantizedArray, Weight, dense, slice_weight, take_weight

# Logits held at a time: 128 MiB in float32; where they are to stay in a CPU's cache, 16 MiB.
LOGITS_AT_A_TIME = 1 << 25
_CACHED_LOGITS = 1 << 22
_MAX_TOKENS = 4096
# Where some tokens may not count: blocks of an eighth of the tokens, so that most can be left out,
# and 2 MiB of logits. Where every token counts they take as long as larger ones.
_COUNTED_BLOCKS = 8
_MIN_COUNTED = 128
_COUNTED_LOGITS = 1 << 19


class _Plan(NamedTuple):
    """Settings of the loss, and block sizes."""

    softcap: float | None
    vocab_axis: int
    tokens: int
    vocab: int


def token_cross_entropy(
    hidden: Hidden,
    head: Float[Array, "V E"] | Float[Array, "E V"] | QuantizedArray,
    tokens: Int[Array, "B T"],
    counts: Bool[Array, "B T"] | None = None,
    *,
    softcap: float | None = None,
    vocab_axis: int = 0,
    tokens_at_a_time: int | None = None,
    vocab_at_a_time: int | None = None,
) -> Float[Array, "B T"]:
    """-log p(token), where the logits are hidden @ head^T.

    The gradient for `hidden` is computed in the forward pass from the same logits, so that no
    logits are made twice (the fused loss of Liger, arXiv:2410.10989). Over blocks of the
    vocabulary it is summed as flash attention sums its values, the head being both keys and
    values: exact, and every block of the head is read once for all tokens.

    Args:
      hidden: [B, T, E].
      head: [V, E], or [E, V] with vocab_axis 1, in any float dtype or quantised; it gets no
        gradient. Of a quantised head one block is dense at a time.
      tokens: what to predict [B, T].
      counts: where a loss is needed; other tokens get 0, and logits are computed for few of them.
        None: everywhere.
      softcap: logits x become softcap * tanh(x / softcap).
      vocab_axis: of the head.
      tokens_at_a_time: tokens of a row in a block; None: on CPU up to 4,096 in all rows, with
        `counts` an eighth of them; elsewhere what makes about 128 MiB of logits.
      vocab_at_a_time: entries in a block; None: on CPU what makes about 16 MiB of logits, 2 MiB
        with `counts`; elsewhere all.

    Returns:
      Nats, float32 [B, T].

    Raises:
      ValueError: if a gradient for the head is requested.
    """
    batch = len(tokens)
    hidden, tokens, counts = jax.tree.map(shards_as_rows, (hidden, tokens, counts))
    length = tokens.shape[1]
    vocab = head.shape[vocab_axis]
    most, cached = _MAX_TOKENS, _CACHED_LOGITS
    if counts is not None:
        most = min(most, max(_MIN_COUNTED, batch * length // _COUNTED_BLOCKS))
        cached = _COUNTED_LOGITS

    def plan(*, on_cpu: bool) -> _Plan:
        size, block = tokens_at_a_time, vocab_at_a_time
        by_vocabulary = on_cpu and size is None
        if size is None:
            size = most if by_vocabulary else LOGITS_AT_A_TIME // vocab
            size = max(1, size // max(batch, 1))
        size = max(1, min(size, length))
        if block is None:
            # Heads of a power of two times something divide evenly.
            fits = max(1024, cached // max(batch * size, 1))
            block = 1 << (fits.bit_length() - 1) if by_vocabulary else vocab
            block = min(block, dense_rows(head, vocab_axis))
        return _Plan(softcap, vocab_axis, size, min(block, vocab))

    plans = PerPlatform(plan(on_cpu=True), plan(on_cpu=False))
    return rows_as_shards(_losses(hidden, head, tokens, counts, plans), batch)


def slice_rows(x: Array, size: int) -> Array:
    """[B, T, ...] -> [n, B, size, ...], filled with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(
    hidden: Array, head: Weight, tokens: Array, counts: Array | None, plans: PerPlatform
) -> Array:
    run = functools.partial(_each_slice, with_gradient=False)
    return run_per_platform(run, plans, hidden, head, tokens, counts)[0]


def _losses_forward(
    hidden: Any, head: Any, tokens: Any, counts: Any, plans: PerPlatform
) -> tuple[Array, Array]:
    if any(part.perturbed for part in jax.tree.leaves(head)):
        raise ValueError(
            "this loss gives the LM head no gradient, but one is requested: pass train_head=True "
            "to the loss, or differentiate other weights only."
        )
    arrays = jax.tree.map(lambda part: part.value, (hidden, head, tokens, counts))
    run = functools.partial(_each_slice, with_gradient=True)
    losses, gradient = run_per_platform(run, plans, *arrays)
    assert gradient is not None
    return losses, gradient


def _losses_backward(plans: PerPlatform, gradient: Array, scale: Any) -> tuple:
    if isinstance(scale, SymbolicZero):
        scale = jnp.zeros(scale.shape, jnp.float32)
    return gradient * scale[..., None].astype(gradient.dtype), None, None, None


# Only so can the forward pass see whether the head is to be trained.
_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)


def _each_slice(
    plan: _Plan,
    hidden: Array,
    head: Weight,
    tokens: Array,
    counts: Array | None,
    *,
    with_gradient: bool,
) -> tuple[Array, Array | None]:
    """Losses [B, T], and their gradients for `hidden`."""
    batch, length, _ = hidden.shape

    def run(hidden: Array, tokens: Array) -> tuple[Array, Array | None]:
        return _slice_losses(hidden, tokens, head, plan, with_gradient)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    if counts is not None:
        return map_counted(run, (hidden, tokens), counts, plan.tokens)
    if plan.tokens >= length:
        return run(hidden, tokens)
    parts = (slice_rows(hidden, plan.tokens), slice_rows(tokens, plan.tokens))
    return jax.tree.map(join, lax.map(lambda part: run(*part), parts))


def _slice_losses(
    hidden: Array, tokens: Array, head: Weight, plan: _Plan, with_gradient: bool
) -> tuple[Array, Array | None]:
    """Losses of a few tokens of each row, block by block of the vocabulary."""
    vocab = head.shape[plan.vocab_axis]
    start = jnp.full(tokens.shape, -jnp.inf)
    grown = jnp.zeros(hidden.shape, jnp.float32) if with_gradient else None

    def visit(number: Array, carry: tuple) -> tuple:
        top, total, gradient = carry
        # The last block overlaps the one before; its repeated entries do not count.
        first = jnp.minimum(number * plan.vocab, vocab - plan.vocab)
        piece = slice_weight(head, first, plan.vocab, plan.vocab_axis)
        piece = _rows(dense(piece, hidden.dtype), plan)
        logits = head_logits(hidden, piece, plan.softcap)
        if vocab % plan.vocab:
            fresh = first + jnp.arange(plan.vocab) >= number * plan.vocab
            logits = jnp.where(fresh, logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - new_top[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        if gradient is not None:
            slopes = (weights * softcap_slope(logits, plan.softcap)).astype(hidden.dtype)
            step = head_product(slopes, piece, 1)
            gradient = gradient * shrink[..., None] + step.astype(jnp.float32)
        return new_top, total, gradient

    blocks = -(-vocab // plan.vocab)
    top, total, gradient = lax.fori_loop(0, blocks, visit, (start, jnp.zeros(tokens.shape), grown))
    rows = take_weight(head, tokens.ravel(), plan.vocab_axis)
    rows = _rows(dense(rows, hidden.dtype), plan)
    rows = rows.reshape(hidden.shape)
    if num_shards() == 1:
        rows = constrain_lookup(rows)
    rows = rows.astype(jnp.float32)
    chosen = jnp.einsum("...e,...e->...", hidden.astype(jnp.float32), rows)
    chosen = apply_softcap(chosen, plan.softcap)
    # Rounding of sums in different orders must not give probabilities above 1.
    losses = jnp.maximum(top + jnp.log(total) - chosen, 0)
    if gradient is None:
        return losses, None
    own = jnp.ones_like(chosen) * softcap_slope(chosen, plan.softcap)
    gradient = gradient / total[..., None] - own[..., None] * rows
    return losses, gradient.astype(hidden.dtype)


def _rows(piece: Array, plan: _Plan) -> Array:
    """A part of the head as [V, E]."""
    return piece if plan.vocab_axis == 0 else piece.T
