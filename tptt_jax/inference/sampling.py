"""Choosing the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """Sampling settings; traced, so that changing them does not recompile.

    Attributes:
      temperature: 0 is greedy, 1 the model's own distribution.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely of these that together have this probability; 1: all.
      min_p: only tokens with at least min_p times the highest probability; 0: all.
      repetition_penalty: positive logits of tokens that the row already holds, prompt
        included, are divided by it, negative ones multiplied (arXiv:1909.05858); 1: none.
    """

    temperature: Float[Array, ""] | float = 0.0
    top_k: Int[Array, ""] | int = 0
    top_p: Float[Array, ""] | float = 1.0
    min_p: Float[Array, ""] | float = 0.0
    repetition_penalty: Float[Array, ""] | float = 1.0

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}.")
        if not self.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty must be positive, got {self.repetition_penalty}: above 1 "
                "discourages repetition, 1 leaves logits alone."
            )


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: Key[Array, "B"],
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Draws one token for each row.

    Args:
      logits: [B, V].
      sampling: sampling settings.
      keys: randomness of each row, so that a row's tokens do not depend on other rows; not used
        when greedy.
      seen: tokens that the repetition penalty applies to; None: none.

    Returns:
      int32 [B].
    """
    logits = logits.astype(jnp.float32)
    if seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)

    def draw() -> Array:
        return jax.vmap(jax.random.categorical)(keys, distribution_logits(logits, sampling))

    greedy = jnp.asarray(sampling.temperature) == 0
    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), draw)
    return token.astype(jnp.int32)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """Divides positive logits of seen tokens by the penalty, and multiplies negative ones."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits to sample from: temperature, then top_k, top_p and min_p; excluded tokens are -inf."""
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    restricted = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return jax.lax.cond(
        jnp.asarray(restricted), lambda: _restrict(scaled, sampling), lambda: scaled
    )


def _restrict(logits: Array, sampling: Sampling) -> Array:
    """Masks out tokens that top_k, top_p and min_p exclude; the most likely one always stays.

    The kept tokens are those above some logit, so a sort of the values is enough; tokens exactly as
    likely as the last kept one stay too.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((rank < sampling.top_k) | (sampling.top_k == 0), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep = (before < sampling.top_p) & (probability >= sampling.min_p * probability[:, :1])
    kept = keep & jnp.isfinite(ranked) | (rank == 0)
    lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
