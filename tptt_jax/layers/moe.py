"""A mixture-of-experts feed-forward sublayer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float, Hidden, Int
from tptt_jax.config import LoraConfig, ModelConfig
from tptt_jax.layers.lora import ROUTER, Projection
from tptt_jax.layers.mlp import ACTIVATIONS
from tptt_jax.layers.parameters import BaseParam
from tptt_jax.layers.quantized import QuantizedWeight, StoredWeight, stored
from tptt_jax.ops.grouped_matmul import group_rows, grouped_matmul
from tptt_jax.ops.quantization import BaseDtype


class ExpertKernels(nnx.Module):
    """The stacked matrices of all experts, [X, I, O]."""

    def __init__(
        self,
        num_experts: int,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str, str],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates them in `dtype`."""
        shape = (num_experts, in_dim, out_dim)
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * in_dim**-0.5
        self.kernel: StoredWeight = BaseParam(kernel.astype(dtype), axes=("experts", *axes))

    def quantize_weights(self, base_dtype: BaseDtype) -> None:
        """Quantises the matrices in place."""
        if isinstance(self.kernel, BaseParam):
            self.kernel = QuantizedWeight(self.kernel, base_dtype, axis=-2)


class ExpertsMLP(nnx.Module):
    """sum over the chosen experts x of weight_x * down_x(activation(gate_x(h)) * up_x(h)).

    The router's softmax runs over all experts, in float32; rows are sorted by expert and
    multiplied in groups, so that the work is that of the chosen experts.
    """

    def __init__(
        self, config: ModelConfig, lora: LoraConfig | None, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Creates router and experts; adapters may sit on the router only."""
        embed, width, count = config.embed_dim, config.mlp_dim, config.num_experts
        self.activation = config.activation
        self.experts_per_token = config.experts_per_token
        self.normalize = config.normalize_expert_weights
        self.router = Projection(
            *(embed, count),
            path=ROUTER,
            axes=("embed", "experts"),
            lora=lora,
            dtype=dtype,
            rngs=rngs,
        )

        def kernels(in_dim: int, out_dim: int, axes: tuple[str, str]) -> ExpertKernels:
            return ExpertKernels(count, in_dim, out_dim, axes=axes, dtype=dtype, rngs=rngs)

        self.gate_proj = nnx.data(None)
        if config.gated_mlp:
            self.gate_proj = kernels(embed, width, ("embed", "mlp"))
        self.up_proj = kernels(embed, width, ("embed", "mlp"))
        self.down_proj = kernels(width, embed, ("mlp", "embed"))

    def __call__(self, x: Hidden, dropout_key: Array | None = None) -> Hidden:
        """[B, T, E] -> [B, T, E]."""
        rows = x.reshape(-1, x.shape[-1])
        weights, experts = self._route(rows, dropout_key)
        grouping = group_rows(experts.reshape(-1), stored(self.up_proj.kernel).shape[0])
        repeated = jnp.repeat(rows, self.experts_per_token, axis=0)

        def multiply(y: Array, kernels: ExpertKernels) -> Array:
            return grouped_matmul(y, stored(kernels.kernel), grouping)

        activation, up = ACTIVATIONS[self.activation], multiply(repeated, self.up_proj)
        if self.gate_proj is None:
            hidden = activation(up)
        else:
            hidden = activation(multiply(repeated, self.gate_proj)) * up
        out = multiply(hidden, self.down_proj).reshape(*weights.shape, -1)
        return jnp.sum(out * weights[..., None].astype(out.dtype), axis=1).reshape(x.shape)

    def _route(
        self, rows: Float[Array, "M E"], dropout_key: Array | None
    ) -> tuple[Float[Array, "M c"], Int[Array, "M c"]]:
        """Weights and numbers of the experts chosen for each row."""
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        shares = jax.nn.softmax(self.router(wide, dropout_key), axis=-1)
        weights, experts = jax.lax.top_k(shares, self.experts_per_token)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts
