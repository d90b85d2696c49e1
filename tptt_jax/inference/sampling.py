"""Choosing the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How tokens are drawn; traced, so that changing it does not recompile.

    Attributes:
      temperature: 0 is greedy, 1 the model's own distribution.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens that together have this probability; 1: all.
    """

    temperature: Float[Array, ""] | float = 0.0
    top_k: Int[Array, ""] | int = 0
    top_p: Float[Array, ""] | float = 1.0

    def check(self) -> None:
        """Raises ValueError for values that no distribution has."""
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")


def sample(logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]) -> Int[Array, "B"]:
    """Draws one token a row.

    Args:
      logits: [B, V].
      sampling: how.
      key: randomness; not used when greedy.

    Returns:
      int32 [B].
    """
    logits = logits.astype(jnp.float32)

    def draw() -> Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        restricted = (sampling.top_k > 0) | (sampling.top_p < 1)
        scaled = jax.lax.cond(
            jnp.asarray(restricted), lambda: _restrict(scaled, sampling), lambda: scaled
        )
        return jax.random.categorical(key, scaled, axis=-1)

    greedy = jnp.asarray(sampling.temperature) == 0
    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), draw)
    return token.astype(jnp.int32)


def _restrict(logits: Array, sampling: Sampling) -> Array:
    """Masks out what top_k and top_p leave no room for; the most likely token always stays."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep = (before < sampling.top_p) & ((rank < sampling.top_k) | (sampling.top_k == 0))
    ranked = jnp.where(keep | (rank == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
