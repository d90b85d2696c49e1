"""OLMo: LayerNorm without parameters, and clipped queries, keys and values if asked."""

from typing import Any

from convert.families.family import Family
from convert.families.fields import Fields, read_sizes, write_sizes
from convert.families.key_tables import standard_rules
from convert.families.rotary import read_flat_rope, write_rope
from tptt_jax import ModelConfig


def read_olmo_config(fields: Fields, **differences: Any) -> ModelConfig:
    """What OLMo, OLMo 2 and OLMoE have in common.

    Args:
      fields: a config.json.
      **differences: arguments of `ModelConfig` that go before.
    """
    fields.require("hidden_act", ("silu",), "silu")
    positions = fields.integer("max_position_embeddings", 2048)
    bias = fields.boolean("attention_bias", False)
    common = {
        **read_sizes(fields),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "clip_qkv": fields.number("clip_qkv", None),
        "tie_embeddings": fields.boolean("tie_word_embeddings", False),
        "rope": read_flat_rope(fields, 10_000.0, positions),
        "max_positions": positions,
    }
    return ModelConfig(**common | differences)


def write_olmo_config(config: ModelConfig, *unused: str) -> dict[str, Any]:
    """The inverse of `read_olmo_config`, without the keys that the family does not have."""
    content = {
        **write_sizes(config, implied_head_dim=True),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "clip_qkv": config.clip_qkv,
        "rope_parameters": write_rope(config.rope),
    }
    return {key: value for key, value in content.items() if key not in unused}


def _read_config(fields: Fields) -> ModelConfig:
    return read_olmo_config(fields, norm="layer", norm_weight=False, norm_eps=1e-5)


FAMILY = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    read_config=_read_config,
    write_config=lambda config: write_olmo_config(config, "rms_norm_eps"),
    rules=lambda config: standard_rules(),
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
)
