"""Evaluates a model on the held-out rows, by the position of the tokens."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from experiments.data import TokenBatch, TokenBatchSource
from experiments.models.limits import check_lengths, check_tokens
from tptt_jax import CausalLM
from tptt_jax.array_typing import Array
from tptt_jax.ops.cross_entropy import token_cross_entropy
from tptt_jax.processes import fetch
from tptt_jax.training.loss import next_token_targets
from tptt_jax.training.train_step import Batch

# Fewest tokens of a point in a curve; fewer would only show noise.
_LEAST_TOKENS = 50


class HeldOut(NamedTuple):
    """Losses of held-out tokens, by their place in the row.

    Attributes:
      nats: summed over rows [T], float64.
      counts: number of tokens [T].
    """

    nats: Float[np.ndarray, " T"]
    counts: Float[np.ndarray, " T"]

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.loss_between(0, len(self.nats))

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss."""
        return math.exp(min(self.loss, 700.0))

    def loss_between(self, first: int, end: int) -> float:
        """Mean nats of the tokens at places first to end - 1; NaN if there are none."""
        count = self.counts[first:end].sum()
        return float(self.nats[first:end].sum() / count) if count else math.nan

    def curve(self, bins: int = 12) -> tuple[list[float], list[float]]:
        """Centers of bins of places, with growing widths, and their perplexities."""
        last = int(np.flatnonzero(self.counts)[-1]) + 1
        edges = np.unique(np.geomspace(min(8, last), last, bins + 1).round().astype(int))
        least = min(_LEAST_TOKENS, self.counts.sum())
        places, values, first = [], [], 0
        for end in edges:
            # Short bins join the next one.
            if self.counts[first:end].sum() >= least:
                places.append((first + end) / 2)
                values.append(math.exp(self.loss_between(first, end)))
                first = end
        return places, values


def evaluate_held_out(
    model: CausalLM,
    source: TokenBatchSource,
    put: Callable[[TokenBatch], Batch],
    *,
    batch_size: int,
    use_memory: bool = True,
) -> HeldOut:
    """Runs a model over all held-out rows.

    Args:
      model: a base model or a Titan.
      source: the rows.
      put: moves a batch to the devices.
      batch_size: rows at a time.
      use_memory: False leaves the memory out.
    """
    check_tokens(source.tokens, model.config.vocab_size)
    check_lengths(source.segment_ids, model.config, "--data.eval-length")
    # No result is looked at before all batches are on their way.
    sums = [
        _losses_by_place(model, put(batch), use_memory=use_memory)
        for batch in source.batches(batch_size)
    ]
    totals = np.sum([[fetch(x).astype(np.float64) for x in pair] for pair in sums], axis=0)
    return HeldOut(totals[0], totals[1])


def recovered_gap(full: float, window: float, titan: float) -> float | None:
    """(window - Titan) / (window - full), in nats; None if the window loses nothing."""
    gap = window - full
    return (window - titan) / gap if gap > 1e-6 else None


def losses_by_place(model: CausalLM, batch: Batch, *, use_memory: bool) -> tuple[Array, Array]:
    """Summed nats and counted tokens of every place [T]; place t is predicted from t - 1.

    Args:
      model: a base model or a Titan.
      batch: rows [B, T].
      use_memory: False leaves the memory out.

    Raises:
      ValueError: if the model cannot read a token or a row.
    """
    check_tokens(np.asarray(batch.tokens), model.config.vocab_size)
    check_lengths(batch.segment_ids, model.config, "--data.eval-length")
    return _losses_by_place(model, batch, use_memory=use_memory)


@functools.partial(nnx.jit, static_argnames="use_memory")
def _losses_by_place(model: CausalLM, batch: Batch, *, use_memory: bool) -> tuple[Array, Array]:
    hidden, _, _ = model.forward_hidden(batch.tokens, batch.segment_ids, use_memory=use_memory)
    targets = next_token_targets(*batch)
    head, vocab_axis = model.head_matrix()
    losses = token_cross_entropy(
        hidden, head, targets.tokens, softcap=model.config.final_softcap, vocab_axis=vocab_axis
    )
    shifted = (jnp.roll(x, 1, axis=1) for x in (losses * targets.weights, targets.weights))
    nats, counts = (jnp.sum(x, axis=0) for x in shifted)
    return nats, counts
