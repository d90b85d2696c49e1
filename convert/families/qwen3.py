"""Qwen3, dense: RMS norms on the queries and keys of every head, and a separate head width."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import Fields
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.qwen2 import read_windows, write_old_windows, write_windows
from convert.families.standard import read_attention, read_standard, write_standard
from convert.formats import GgufFile
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig

_ATTENTION = AttentionConfig(qk_norm="head")


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu",), "silu")
    return read_standard(
        fields,
        max_positions=32_768,
        **read_windows(fields),
        head_dim=fields.integer("head_dim", 128),
        attention=read_attention(fields, qk_norm="head"),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_standard(config),
        **write_windows(config),
        "attention_bias": config.attention.bias,
    }


def _read_gguf(file: GgufFile) -> ModelConfig:
    return ModelConfig(**read_gguf_common(file), family="qwen3", attention=_ATTENTION)


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    write_old_config=write_old_windows,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
    gguf=GgufTable(architecture="qwen3", read_config=_read_gguf, rules=gguf_rules),
)
