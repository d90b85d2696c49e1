"""Memory as Gate: mixes the outputs of softmax and memory (TPTT section 3.2)."""

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, Hidden
from tptt_jax.config import LizaConfig


def mix_heads(
    soft: Float[Array, "B T H D"], linear: Float[Array, "B T H D"], share: Array, match: bool
) -> Float[Array, "B T H D"]:
    """(1 - share) soft + share linear, the latter with the RMS of the former if `match`."""
    linear = match_rms(linear, soft) if match else linear
    return (1 - share) * soft + share * linear


def mix_projected(soft: Hidden, linear: Hidden, share: Array, liza: LizaConfig) -> Hidden:
    """Mixes as tptt 0.12.1: both branches include the output projection's bias [B, T, E]."""
    if liza.linear_scale == "projected":
        linear = linear * root_mean_square(soft)
    soft, linear = (1 - share) * soft, share * linear
    return soft + linear + soft * linear if liza.cross_gate else soft + linear


def root_mean_square(x: Hidden) -> Float[Array, "B T 1"]:
    """sqrt(mean(x^2) + 1e-5) over the last axis, in float32, then x's dtype."""
    wide = x.astype(jnp.float32)
    return jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5).astype(x.dtype)


def match_rms(
    linear: Float[Array, "B T H D"], soft: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Gives every head of `linear` the RMS that it has in `soft`, token by token."""
    wide = jnp.promote_types(soft.dtype, jnp.float32)

    def mean_square(x: Array) -> Array:
        return jnp.mean(jnp.square(x.astype(wide)), axis=-1, keepdims=True)

    # Unit RMS over all heads came before, so 1e-6 only guards heads that are silent.
    ratio = jnp.sqrt((mean_square(soft) + 1e-12) / (mean_square(linear) + 1e-6))
    return linear * ratio.astype(linear.dtype)
