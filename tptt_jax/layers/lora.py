"""Projections with optional low-rank adapters."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float
from tptt_jax.config import LoraConfig
from tptt_jax.layers.parameters import AdapterParam, AddedParam, BaseParam
from tptt_jax.layers.quantized import QuantizedWeight, StoredWeight, stored
from tptt_jax.ops.context import is_split
from tptt_jax.ops.quantization import TABLE_FORMAT, BaseDtype, dense
from tptt_jax.ops.residuals import save_mixed, save_product

HEAD, ROUTER = "lm_head", "mlp.router"
"""Paths of projections that differ from the others."""


class LowRank(nnx.Module):
    """scale * (x a) b, a float32 adapter that starts as zero (arXiv:2106.09685)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        axes: tuple[str, str],
        param: type[AddedParam] = AdapterParam,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates a [in_dim, rank], uniform as in PEFT, and b [rank, out_dim], zero."""
        self.scale = scale
        self.dropout = dropout
        bound = in_dim**-0.5
        a = jax.random.uniform(rngs.params(), (in_dim, rank), minval=-bound, maxval=bound)
        self.a = param(a, axes=(axes[0], "rank"))
        self.b = param(jnp.zeros((rank, out_dim)), axes=("rank", axes[1]))

    def __call__(
        self, x: Float[Array, "... I"], dropout_key: Array | None = None
    ) -> Float[Array, "... O"]:
        """The update for inputs x, float32; a key turns dropout on."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if dropout_key is not None and self.dropout > 0:
            keep = save_mixed(jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape))
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        # All tokens as one matrix: XLA would transpose a batch for the gradients of a and b. But it
        # would gather rows whose tokens are divided among devices.
        is_divided = x.ndim > 2 and is_split(x.shape[1])
        flat = x if is_divided else x.reshape(-1, x.shape[-1])
        return ((flat @ self.a[...]) @ (self.b[...] * self.scale)).reshape(*x.shape[:-1], -1)

    def delta(self) -> Float[Array, "I O"]:
        """The adapter's addition to the kernel, float32."""
        return jnp.matmul(self.a[...], self.b[...], precision="highest") * self.scale


class Projection(nnx.Module):
    """y = x W (+ bias), plus the low-rank update if `lora` names this path."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        path: str,
        axes: tuple[str, str],
        bias: bool = False,
        lora: LoraConfig | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates kernel [in_dim, out_dim] and bias [out_dim] in `dtype`."""
        self.path = path
        kernel = jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32) * in_dim**-0.5
        self.kernel: StoredWeight = BaseParam(kernel.astype(dtype), axes=axes)
        self.bias = nnx.data(None)
        if bias:
            self.bias = BaseParam(jnp.zeros((out_dim,), dtype), axes=axes[1:])
        self.lora = nnx.data(None)
        if lora is not None and lora.matches(path):
            self.lora = LowRank(
                in_dim,
                out_dim,
                rank=lora.rank,
                scale=lora.scale,
                dropout=lora.dropout,
                axes=axes,
                rngs=rngs,
            )

    def __call__(
        self,
        x: Float[Array, "... I"],
        dropout_key: Array | None = None,
        *,
        use_bias: bool = True,
    ) -> Float[Array, "... O"]:
        """Projects the last axis; the result has the kernel's dtype promoted with x's."""
        y = x @ dense(stored(self.kernel), x.dtype)
        if self.bias is not None and use_bias:
            y += self.bias[...].astype(y.dtype)
        if self.lora is not None:
            y += self.lora(x, fold_path(dropout_key, self.path)).astype(y.dtype)
        return save_product(y)

    def quantize_weights(self, base_dtype: BaseDtype) -> None:
        """Quantises the kernel in place, except a router's: small and sensitive to rounding."""
        if isinstance(self.kernel, BaseParam) and self.path != ROUTER:
            format = TABLE_FORMAT if self.path == HEAD else base_dtype
            self.kernel = QuantizedWeight(self.kernel, format, axis=-2)

    def merged_kernel(self) -> Float[Array, "I O"]:
        """Kernel and adapter as one float32 matrix."""
        kernel = dense(stored(self.kernel), jnp.float32)
        return kernel if self.lora is None else kernel + self.lora.delta()


def fold_path(key: Array | None, path: str) -> Array | None:
    """A separate key for every place in the layer; None stays None."""
    return None if key is None else jax.random.fold_in(key, path_number(path))


def path_number(path: str) -> int:
    """A distinct number for every path, the same in every process."""
    return zlib.crc32(path.encode())
