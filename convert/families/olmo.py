"""OLMo: LayerNorm without parameters, and clipped queries, keys and values if asked."""

from typing import Any

from convert.families.family import Family
from convert.families.fields import Fields
from convert.families.key_tables import standard_rules
from convert.families.standard import (
    read_attention,
    read_standard,
    write_old_standard,
    write_standard,
)
from tptt_jax import ModelConfig
from tptt_jax.config import NormConfig, QkNorm


def read_olmo_config(
    fields: Fields, *, qk_norm: QkNorm | None = None, **differences: Any
) -> ModelConfig:
    """What OLMo, OLMo 2 and OLMoE have in common.

    Args:
      fields: a config.json.
      qk_norm: see `AttentionConfig`.
      **differences: arguments of `ModelConfig` that take precedence.
    """
    fields.require("hidden_act", ("silu",), "silu")
    clip = fields.number("clip_qkv", None)
    attention = read_attention(fields, qk_norm=qk_norm, clip_qkv=clip)
    return read_standard(fields, max_positions=2048, attention=attention, **differences)


def write_olmo_config(config: ModelConfig, *unused: str) -> dict[str, Any]:
    """The inverse of `read_olmo_config`, without the keys that the family does not have."""
    content = {
        **write_standard(config, implied_head_dim=True),
        "attention_bias": config.attention.bias,
        "clip_qkv": config.attention.clip_qkv,
    }
    return {key: value for key, value in content.items() if key not in unused}


def _read_config(fields: Fields) -> ModelConfig:
    return read_olmo_config(fields, norm=NormConfig(kind="layer", weight=False, eps=1e-5))


FAMILY = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    read_config=_read_config,
    write_config=lambda config: write_olmo_config(config, "rms_norm_eps"),
    rules=lambda config: standard_rules(),
    write_old_config=write_old_standard,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
)
