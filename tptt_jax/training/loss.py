"""Cross-entropy that never holds the logits of the whole batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, Bool, Float, Hidden, Int, SegmentIds, Tokens
from tptt_jax.config import Remat
from tptt_jax.model import CausalLM
from tptt_jax.ops.context import shards_as_rows
from tptt_jax.ops.cross_entropy import LOGITS_AT_A_TIME, slice_rows, token_cross_entropy
from tptt_jax.ops.distillation import token_divergence
from tptt_jax.ops.lm_head import head_logits
from tptt_jax.ops.quantization import QuantizedArray


class Targets(NamedTuple):
    """The prediction targets.

    Attributes:
      tokens: the next token [B, T].
      weights: its weight, 1 or 0 unless the caller gives others [B, T], float32.
    """

    tokens: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def next_token_targets(
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"] | None = None,
) -> Targets:
    """The next token of the same document, where `loss_mask` marks it as a target.

    Args:
      tokens: [B, T].
      segment_ids: [B, T], 0 = padding; None: one document per row.
      loss_mask: True on tokens whose prediction counts, or its weight; None: all.
    """
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    counts = jnp.ones(tokens.shape, bool) if loss_mask is None else loss_mask
    counts = jnp.pad(counts[:, 1:], ((0, 0), (0, 1)))
    if segment_ids is not None:
        next_ids = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        counts = jnp.where((segment_ids == next_ids) & (segment_ids != 0), counts, 0)
    return Targets(following, counts.astype(jnp.float32))


def chunked_cross_entropy(
    hidden: Hidden,
    head: Float[Array, "V E"] | Float[Array, "E V"] | QuantizedArray,
    targets: Targets,
    *,
    softcap: float | None = None,
    train_head: bool = False,
    vocab_axis: int = 0,
    tokens_at_a_time: int | None = None,
    vocab_at_a_time: int | None = None,
) -> Float[Array, ""]:
    """Sum of weight * -log p(target), with a block of the logits at a time.

    Hardly any logits are computed for targets whose weight is 0.

    Args:
      hidden: [B, T, E].
      head: [V, E], or [E, V] with vocab_axis 1, in any float dtype or quantised.
      targets: tokens to predict and their weights.
      softcap: logits x become softcap * tanh(x / softcap).
      train_head: also gives a gradient for `head`; logits are then computed twice.
      vocab_axis: of the head.
      tokens_at_a_time: per row; None: as `token_cross_entropy` finds best.
      vocab_at_a_time: not with train_head; None: as `token_cross_entropy` finds best.

    Returns:
      float32 scalar; divide by sum(targets.weights) for the mean.
    """
    if train_head:
        assert not isinstance(head, QuantizedArray), "quantised weights are never trained"
        head = head if vocab_axis == 0 else head.T
        return _sum_recomputed(hidden, targets, head, softcap, tokens_at_a_time)
    losses = token_cross_entropy(
        hidden,
        head,
        targets.tokens,
        targets.weights != 0,
        softcap=softcap,
        vocab_axis=vocab_axis,
        tokens_at_a_time=tokens_at_a_time,
        vocab_at_a_time=vocab_at_a_time,
    )
    return jnp.sum(losses * targets.weights)


def _sum_recomputed(
    hidden: Array, targets: Targets, head: Array, softcap: float | None, size: int | None
) -> Array:
    batch = len(hidden)
    hidden, targets = jax.tree.map(shards_as_rows, (hidden, targets))
    tokens = hidden.shape[1]
    size = min(size or max(1, LOGITS_AT_A_TIME // (head.shape[0] * batch)), tokens)

    @jax.checkpoint
    def body(total: Array, part: tuple) -> tuple[Array, None]:
        hidden, tokens, weights = part
        logits = head_logits(hidden, head, softcap)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return total + jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)), None

    slices = jax.tree.map(lambda x: slice_rows(x, size), (hidden, *targets))
    return lax.scan(body, jnp.zeros(()), slices)[0]


def causal_lm_loss(
    model: CausalLM,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    loss_mask: Bool[Array, "B T"] | None = None,
    *,
    use_memory: bool = True,
    window: Int[Array, ""] | None = None,
    remat: Remat = "none",
    train_head: bool = False,
    rngs: nnx.Rngs | None = None,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the next tokens, and their number.

    Args:
      model: the model.
      tokens: [B, T].
      segment_ids: packed documents, 0 = padding.
      loss_mask: True on tokens whose prediction counts; None: all.
      use_memory: False leaves the memory out.
      window: below the model's own, as a traced scalar; None: the model's own.
      remat: what the backward pass computes again.
      train_head: whether the head (or the tied embedding) needs a gradient.
      rngs: see `CausalLM.__call__`.
      dropout_key: turns dropout on.

    Returns:
      (sum in nats, count), float32 scalars; the mean is their quotient.

    Raises:
      ValueError: if the head is differentiated without train_head.
    """
    hidden, _, _ = model.forward_hidden(
        tokens,
        segment_ids,
        use_memory=use_memory,
        window=window,
        remat=remat,
        rngs=rngs,
        dropout_key=dropout_key,
    )
    targets = next_token_targets(tokens, segment_ids, loss_mask)
    head, vocab_axis = model.head_matrix()
    total = chunked_cross_entropy(
        hidden,
        head,
        targets,
        vocab_axis=vocab_axis,
        softcap=model.config.final_softcap,
        train_head=train_head,
    )
    return total, jnp.sum(targets.weights)


def distillation_loss(
    model: CausalLM,
    teacher: CausalLM,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    loss_mask: Bool[Array, "B T"] | None = None,
    *,
    share: float = 1.0,
    window: Int[Array, ""] | None = None,
    remat: Remat = "none",
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed KL(teacher || model) of the next tokens, mixed with their negative log-likelihood.

    Args:
      model: the student; its head is the teacher's and is not trained.
      teacher: e.g. `base_model(model)`; it gets no gradient.
      tokens: [B, T].
      segment_ids: packed documents, 0 = padding.
      loss_mask: True on tokens whose prediction counts; None: all.
      share: weight of the divergence; the likelihood of the text has 1 - share.
      window: below the student's own, as a traced scalar; None: the student's own.
      remat: what the backward pass computes again.
      dropout_key: turns dropout on, in the student.

    Returns:
      (sum in nats, count), float32 scalars; the mean is their quotient.
    """
    teacher_hidden = jax.lax.stop_gradient(teacher.forward_hidden(tokens, segment_ids)[0])
    hidden, _, _ = model.forward_hidden(
        tokens, segment_ids, window=window, remat=remat, dropout_key=dropout_key
    )
    targets = next_token_targets(tokens, segment_ids, loss_mask)
    head, vocab_axis = model.head_matrix()
    options: Any = {"softcap": model.config.final_softcap, "vocab_axis": vocab_axis}
    divergence = token_divergence(hidden, teacher_hidden, head, **options)
    total = share * jnp.sum(divergence * targets.weights)
    if share < 1:
        total += (1 - share) * chunked_cross_entropy(hidden, head, targets, **options)
    return total, jnp.sum(targets.weights)
