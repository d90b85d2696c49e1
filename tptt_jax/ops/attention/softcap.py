"""Soft caps on logits: x becomes cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118)."""

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float


def apply_softcap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Logits of any shape, capped in their dtype; None caps nothing."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def softcap_slope(capped: Float[Array, "..."], cap: float | None) -> Float[Array, "..."] | float:
    """The derivative of the soft cap, computed from the capped logits.

    It is 0 where a logit far below every cap masks an entry.
    """
    # The square of such a logit would overflow.
    return 1.0 if cap is None else 1 - jnp.square(jnp.maximum(capped, -cap) / cap)
