"""Qwen3, dense: RMS norms on the queries and keys of every head, heads of a width of their own."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import Fields, read_sizes, write_sizes
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.qwen2 import read_windows, write_windows
from convert.families.rotary import read_flat_rope, write_rope
from convert.gguf_io import GgufFile
from tptt_jax import ModelConfig


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(fields) | {"head_dim": fields.integer("head_dim", 128)}
    positions = fields.integer("max_position_embeddings", 32_768)
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **sizes,
        **read_windows(fields, sizes["num_layers"]),
        qk_norm="head",
        attention_bias=bias,
        attention_out_bias=bias,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=read_flat_rope(fields, 10_000.0, positions),
        max_positions=positions,
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_windows(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "rope_parameters": write_rope(config.rope),
    }


def _read_gguf(file: GgufFile) -> ModelConfig:
    return ModelConfig(**read_gguf_common(file), family="qwen3", qk_norm="head")


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
    gguf=GgufTable(architecture="qwen3", read_config=_read_gguf, rules=gguf_rules),
)
