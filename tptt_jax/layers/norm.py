"""RMS norm and LayerNorm as in the pretrained families."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float
from tptt_jax.config import ModelConfig, Norm
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

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        kind: Norm = "rms",
        weight: bool = True,
        bias: bool = False,
        offset: bool = False,
        float32: bool = False,
        dtype: DTypeLike,
    ) -> None:
        """Creates weight and bias [dim] in `dtype`, which initially have no effect."""
        self.eps = eps
        self.kind = kind
        self.offset = offset
        self.float32 = float32 or offset or bias
        self.weight = self.bias = nnx.data(None)
        if weight:
            fill = jnp.zeros if offset else jnp.ones
            self.weight = BaseParam(fill((dim,), dtype), axes=("norm",))
        if bias:
            self.bias = BaseParam(jnp.zeros((dim,), dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; returns x's shape and dtype."""
        weight = None if self.weight is None else self.weight[...]
        bias = None if self.bias is None else self.bias[...]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = rms_normalize(wide, self.eps)
        normal = normal if self.float32 else normal.astype(x.dtype)
        if weight is not None:
            weight = weight.astype(normal.dtype)
            normal = normal * (1 + weight if self.offset else weight)
        if bias is not None:
            normal = normal + bias.astype(normal.dtype)
        return normal.astype(x.dtype)


def residual_norm(config: ModelConfig, dtype: DTypeLike) -> NormLayer:
    """A norm of the residual stream, over embed_dim."""
    return NormLayer(
        config.embed_dim,
        eps=config.norm_eps,
        kind=config.norm,
        weight=config.norm_weight,
        bias=config.norm_bias,
        offset=config.norm_offset,
        float32=config.norm_float32,
        dtype=dtype,
    )


def query_key_norm(config: ModelConfig, heads: int, dtype: DTypeLike) -> NormLayer:
    """The RMS norm of queries or keys: over each head, or over all of them together."""
    width = heads * config.head_dim if config.qk_norm == "full" else config.head_dim
    return NormLayer(
        width,
        eps=config.norm_eps,
        offset=config.norm_offset,
        float32=config.norm_float32,
        dtype=dtype,
    )
