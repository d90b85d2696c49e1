"""RMS normalisation as the pretrained families do it."""

import jax.numpy as jnp
from flax import nnx

from tptt_jax.array_typing import Array, Float


def rms_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """Divides by sqrt(mean(x^2) + eps) over the last axis, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jnp.reciprocal(jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps))


class RMSNorm(nnx.Module):
    """RMS norm with a learned weight over the last axis.

    With `offset` the factor is 1 + weight, multiplied in float32 (Gemma); without,
    the normalised value is cast to the input's dtype first (Llama).
    """

    def __init__(self, dim: int, *, eps: float, offset: bool, dtype: jnp.dtype) -> None:
        """Creates the weight [dim] in `dtype`, such that the norm starts as the identity."""
        self.eps = eps
        self.offset = offset
        fill = jnp.zeros if offset else jnp.ones
        self.weight = nnx.Param(fill((dim,), dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; returns x's shape and dtype."""
        normal = rms_normalize(x, self.eps)
        if self.offset:
            return (normal * (1 + self.weight[...].astype(normal.dtype))).astype(x.dtype)
        return normal.astype(x.dtype) * self.weight[...].astype(x.dtype)
