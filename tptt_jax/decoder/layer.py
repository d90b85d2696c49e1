"""One decoder layer: attention and MLP around the residual stream."""

from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Hidden
from tptt_jax.config import LizaConfig, LoraConfig, ModelConfig, NormPlacement
from tptt_jax.layers.cache import MemoryState
from tptt_jax.layers.liza import LayerTokens, LizaAttention, LizaOutput
from tptt_jax.layers.mlp import MLP
from tptt_jax.layers.moe import ExpertsMLP
from tptt_jax.layers.norm import NormLayer, residual_norm
from tptt_jax.ops.placement import constrain


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual stream."""

    def __init__(
        self,
        self_attn: LizaAttention,
        mlp: MLP | ExpertsMLP,
        *,
        attn_norm: NormLayer | None = None,
        attn_post_norm: NormLayer | None = None,
        mlp_norm: NormLayer | None = None,
        mlp_post_norm: NormLayer | None = None,
    ) -> None:
        """Puts a layer together; `create` makes its parts.

        Args:
          self_attn: attention, with a memory or without.
          mlp: one MLP or several experts.
          attn_norm: of the input of the attention.
          attn_post_norm: of its output, before it is added to the residual stream.
          mlp_norm: of the input of the MLP.
          mlp_post_norm: of its output.
        """
        self.attn_norm = nnx.data(attn_norm)
        self.self_attn = self_attn
        self.attn_post_norm = nnx.data(attn_post_norm)
        self.mlp_norm = nnx.data(mlp_norm)
        self.mlp = mlp
        self.mlp_post_norm = nnx.data(mlp_post_norm)

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        *,
        with_memory: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> "DecoderLayer":
        """A layer with random weights; `config` has its sizes (see `ModelConfig.of_layer`)."""

        def norm(*placements: NormPlacement) -> NormLayer | None:
            return residual_norm(config, dtype) if config.norm.placement in placements else None

        feed_forward = ExpertsMLP if config.experts.number else MLP
        return cls(
            LizaAttention(config, liza, lora, with_memory=with_memory, dtype=dtype, rngs=rngs),
            feed_forward(config, lora, dtype=dtype, rngs=rngs),
            attn_norm=norm("before", "both"),
            attn_post_norm=norm("after", "both"),
            mlp_norm=norm("before", "both"),
            mlp_post_norm=norm("after", "both"),
        )

    def __call__(
        self,
        x: Hidden,
        tokens: LayerTokens,
        *,
        memory_state: MemoryState | None = None,
        use_memory: bool = True,
        dropout_key: Array | None = None,
    ) -> tuple[Hidden, LizaOutput]:
        """[B, T, E] -> [B, T, E]; arguments as those of `LizaAttention`."""
        attended = self.self_attn(
            apply_norm(self.attn_norm, x),
            tokens,
            memory_state=memory_state,
            use_memory=use_memory,
            dropout_key=dropout_key,
        )
        return self.add(x, attended.out, dropout_key), attended

    def add(self, x: Hidden, attended: Hidden, dropout_key: Array | None = None) -> Hidden:
        """Adds the attention output, then the MLP's output, to the residual stream."""
        x = _constrain_residual(x + apply_norm(self.attn_post_norm, attended))
        out = self.mlp(apply_norm(self.mlp_norm, x), dropout_key)
        return _constrain_residual(x + apply_norm(self.mlp_post_norm, out))


def apply_norm(norm: NormLayer | None, x: Hidden) -> Hidden:
    """Applies a norm; None returns x."""
    return x if norm is None else norm(x)


def _constrain_residual(x: Hidden) -> Hidden:
    return constrain(x, "rows", "tokens", None)
