"""RMS norm and LayerNorm as in the pretrained families."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float
from tptt_jax.config import ModelConfig, NormConfig
from tptt_jax.layers.parameters import BaseParam


def rms_normalize(
    x: Float[Array, "... D"], eps: float = 1e-6, *, axis: int | tuple[int, ...] = -1
) -> Float[Array, "... D"]:
    """Divides by sqrt(mean(x^2) + eps) over `axis`, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jnp.reciprocal(jnp.sqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + eps))


class NormLayer(nnx.Module):
    """RMS norm or LayerNorm over the last axis.

    The normalised value is cast to the input's dtype before it is multiplied by the weight
    (Llama), unless `float32` or `offset` (a factor of 1 + weight) asks for float32 (OLMo 2,
    Gemma) or there is a bias, which torch's layer_norm adds in float32 as well.
    """

    def __init__(self, dim: int, config: NormConfig, *, dtype: DTypeLike) -> None:
        """Creates weight and bias [dim] in `dtype`, which initially have no effect."""
        self.config = config
        self.weight = self.bias = nnx.data(None)
        if config.weight:
            fill = jnp.zeros if config.offset else jnp.ones
            self.weight = BaseParam(fill((dim,), dtype), axes=("norm",))
        if config.bias:
            self.bias = BaseParam(jnp.zeros((dim,), dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; returns x's shape and dtype."""
        config = self.config
        weight = None if self.weight is None else self.weight[...]
        bias = None if self.bias is None else self.bias[...]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if config.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = rms_normalize(wide, config.eps)
        stays_wide = config.float32 or config.offset or config.bias
        normal = normal if stays_wide else normal.astype(x.dtype)
        if weight is not None:
            weight = weight.astype(normal.dtype)
            normal = normal * (1 + weight if config.offset else weight)
        if bias is not None:
            normal = normal + bias.astype(normal.dtype)
        return normal.astype(x.dtype)


def residual_norm(config: ModelConfig, dtype: DTypeLike) -> NormLayer:
    """A norm of the residual stream, over embed_dim."""
    return NormLayer(config.embed_dim, config.norm, dtype=dtype)


def query_key_norm(config: ModelConfig, heads: int, dtype: DTypeLike) -> NormLayer:
    """The RMS norm of queries or keys: over each head, or over all of them together."""
    width = heads * config.head_dim if config.attention.qk_norm == "full" else config.head_dim
    norm = dataclasses.replace(config.norm, kind="rms", weight=True, bias=False)
    return NormLayer(width, norm, dtype=dtype)
