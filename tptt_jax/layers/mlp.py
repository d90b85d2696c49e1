"""The feed-forward sublayer of one expert."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Hidden
from tptt_jax.config import LoraConfig, ModelConfig
from tptt_jax.layers.lora import Projection
from tptt_jax.ops.placement import constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(
        self, config: ModelConfig, lora: LoraConfig | None, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Creates two or three projections between embed_dim and mlp_dim."""

        def projection(name: str, in_dim: int, out_dim: int, axes: tuple[str, str]) -> Projection:
            return Projection(
                in_dim,
                out_dim,
                path=f"mlp.{name}",
                axes=axes,
                bias=config.mlp.bias,
                lora=lora,
                dtype=dtype,
                rngs=rngs,
            )

        embed, width = config.embed_dim, config.mlp_dim
        self.activation = config.mlp.activation
        self.gate_proj = nnx.data(None)
        if config.mlp.gated:
            self.gate_proj = projection("gate_proj", embed, width, ("embed", "mlp"))
        self.up_proj = projection("up_proj", embed, width, ("embed", "mlp"))
        self.down_proj = projection("down_proj", width, embed, ("mlp", "embed"))

    def __call__(self, x: Hidden, dropout_key: Array | None = None) -> Hidden:
        """[B, T, E] -> [B, T, E]."""
        activation, up = ACTIVATIONS[self.activation], self._widen(self.up_proj, x, dropout_key)
        if self.gate_proj is None:
            return self.down_proj(activation(up), dropout_key)

        gate = activation(self._widen(self.gate_proj, x, dropout_key))
        return self.down_proj(gate * up, dropout_key)

    def _widen(self, project: Projection, x: Hidden, key: Array | None) -> Array:
        """[B, T, E] -> [B, T, F]."""
        return constrain(project(x, key), "rows", "tokens", "mlp")
