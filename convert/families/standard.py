"""Configuration fields that decoders with Llama's names share."""

from typing import Any

from convert.families.fields import Fields, read_sizes, write_sizes
from convert.families.rotary import read_flat_rope, write_old_rope, write_rope
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig


def read_standard(fields: Fields, *, max_positions: int, **differences: Any) -> ModelConfig:
    """Sizes, tied head, and one rotary embedding for all layers.

    Args:
      fields: a config.json.
      max_positions: the family's default of `max_position_embeddings`.
      **differences: arguments of `ModelConfig` that take precedence.

    Raises:
      ConversionError: if a key is missing, of the wrong type, or not implemented.
    """
    positions = fields.integer("max_position_embeddings", max_positions)
    common = {
        **read_sizes(fields),
        "tie_embeddings": fields.boolean("tie_word_embeddings", False),
        "rope": read_flat_rope(fields, 10_000.0, positions),
        "max_positions": positions,
    }
    return ModelConfig(**common | differences)


def write_standard(config: ModelConfig, *, implied_head_dim: bool = False) -> dict[str, Any]:
    """The inverse of `read_standard`; see `write_sizes` for `implied_head_dim`."""
    return {
        **write_sizes(config, implied_head_dim=implied_head_dim),
        "hidden_act": "silu",
        "rope_parameters": write_rope(config.rope, config.max_positions),
    }


def write_old_standard(config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding under its published keys (see `Family.write_old_config`)."""
    return write_old_rope(config.rope, config.max_positions)


def read_attention(fields: Fields, **settings: Any) -> AttentionConfig:
    """Attention with `attention_bias` on all four projections, and further settings."""
    bias = fields.boolean("attention_bias", False)
    return AttentionConfig(bias=bias, out_bias=bias, **settings)
