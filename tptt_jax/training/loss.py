"""Cross-entropy that never holds the logits of the whole batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Bool, Float, Hidden, Int, SegmentIds, Tokens
from tptt_jax.model import CausalLM

# Logits held at a time: 128 MiB in float32.
_LOGITS_AT_A_TIME = 1 << 25


class Targets(NamedTuple):
    """What each place has to predict.

    Attributes:
      tokens: the next token [B, T].
      weights: 1 where it counts, else 0 [B, T], float32.
    """

    tokens: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def next_token_targets(
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    loss_mask: Bool[Array, "B T"] | None = None,
) -> Targets:
    """The next token of the same document, where `loss_mask` marks it as a target.

    Args:
      tokens: [B, T].
      segment_ids: [B, T], 0 = padding; None: one document per row.
      loss_mask: True on tokens whose prediction counts; None: all.
    """
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    counts = jnp.ones(tokens.shape, bool) if loss_mask is None else loss_mask
    counts = jnp.pad(counts[:, 1:], ((0, 0), (0, 1)))
    if segment_ids is not None:
        next_ids = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        counts &= (segment_ids == next_ids) & (segment_ids != 0)
    return Targets(following, counts.astype(jnp.float32))


def chunked_cross_entropy(
    hidden: Hidden,
    head: Float[Array, "V E"],
    targets: Targets,
    *,
    softcap: float | None = None,
    train_head: bool = False,
    tokens_at_a_time: int | None = None,
) -> Float[Array, ""]:
    """Sum of weight * -log p(target), with logits hidden @ head^T made a slice at a time.

    While the head is frozen, the gradient for `hidden` is computed in the forward pass
    from the same logits, so that no logits are made twice (the fused loss of Liger).

    Args:
      hidden: [B, T, E].
      head: [V, E], in any float dtype.
      targets: what to predict and what counts.
      softcap: logits x become softcap * tanh(x / softcap).
      train_head: also gives a gradient for `head`; slices are then recomputed.
      tokens_at_a_time: slice length per row; None: about 128 MiB of logits.

    Returns:
      float32 scalar; divide by sum(targets.weights) for the mean.
    """
    batch, tokens, _ = hidden.shape
    if tokens_at_a_time is None:
        tokens_at_a_time = max(1, _LOGITS_AT_A_TIME // (head.shape[0] * batch))
    size = min(tokens_at_a_time, tokens)
    pad = -tokens % size
    slices = jax.tree.map(lambda x: _slice_rows(x, size, pad), (hidden, *targets))
    if train_head:
        return _sum_recomputed(slices, head, softcap)
    return _sum_fused(*slices, head, softcap)


def _slice_rows(x: Array, size: int, pad: int) -> Array:
    """[B, n * size - pad, ...] -> [n, B, size, ...]."""
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _logits(hidden: Array, head: Array, softcap: float | None) -> Array:
    logits = jnp.einsum("bte,ve->btv", hidden, head.astype(hidden.dtype)).astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _slice_loss(logits: Array, tokens: Array, weights: Array) -> Array:
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))


def _sum_recomputed(slices: tuple, head: Array, softcap: float | None) -> Array:
    @jax.checkpoint
    def body(total: Array, part: tuple) -> tuple[Array, None]:
        hidden, tokens, weights = part
        return total + _slice_loss(_logits(hidden, head, softcap), tokens, weights), None

    return lax.scan(body, jnp.zeros(()), slices)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum_fused(
    hidden: Array, tokens: Array, weights: Array, head: Array, softcap: float | None
) -> Array:
    def body(total: Array, part: tuple) -> tuple[Array, None]:
        hidden, tokens, weights = part
        return total + _slice_loss(_logits(hidden, head, softcap), tokens, weights), None

    return lax.scan(body, jnp.zeros(()), (hidden, tokens, weights))[0]


def _fused_forward(
    hidden: Array, tokens: Array, weights: Array, head: Array, softcap: float | None
) -> tuple[Array, Array]:
    def body(total: Array, part: tuple) -> tuple[Array, Array]:
        hidden, tokens, weights = part
        logits = _logits(hidden, head, softcap)
        loss = _slice_loss(logits, tokens, weights)
        target = jnp.arange(logits.shape[-1]) == tokens[..., None]
        slope = (jax.nn.softmax(logits, axis=-1) - target) * weights[..., None]
        if softcap is not None:
            slope *= 1 - jnp.square(logits / softcap)
        gradient = jnp.einsum("btv,ve->bte", slope.astype(hidden.dtype), head.astype(hidden.dtype))
        return total + loss, gradient

    return lax.scan(body, jnp.zeros(()), (hidden, tokens, weights))


def _fused_backward(softcap: float | None, gradient: Array, scale: Array) -> tuple:
    return gradient * scale.astype(gradient.dtype), None, None, None


_sum_fused.defvjp(_fused_forward, _fused_backward)


def head_matrix(model: CausalLM) -> Float[Array, "V E"]:
    """The LM head as [V, E], tied or not."""
    if model.lm_head is None:
        return model.embed.embedding[...]
    return model.lm_head.kernel[...].T


def causal_lm_loss(
    model: CausalLM,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    loss_mask: Bool[Array, "B T"] | None = None,
    *,
    use_memory: bool = True,
    remat: bool = False,
    train_head: bool = False,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the next tokens, and how many there are.

    Args:
      model: the model.
      tokens: [B, T].
      segment_ids: packed documents, 0 = padding.
      loss_mask: True on tokens whose prediction counts; None: all.
      use_memory: False leaves the memory out.
      remat: recompute layers in the backward pass.
      train_head: whether the head (or the tied embedding) needs a gradient.
      dropout_key: turns dropout on.

    Returns:
      (sum in nats, count), float32 scalars; the mean is their quotient.
    """
    hidden, _, _ = model.forward_hidden(
        tokens, segment_ids, use_memory=use_memory, remat=remat, dropout_key=dropout_key
    )
    targets = next_token_targets(tokens, segment_ids, loss_mask)
    total = chunked_cross_entropy(
        hidden,
        head_matrix(model),
        targets,
        softcap=model.config.final_softcap,
        train_head=train_head,
    )
    return total, jnp.sum(targets.weights)
