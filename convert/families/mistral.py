"""Mistral: Llama with a window in every layer, or in none."""

from typing import Any

from convert.families.family import Family
from convert.families.fields import Fields, read_sizes, write_sizes
from convert.families.key_tables import standard_rules
from convert.families.rotary import read_flat_rope, write_rope
from tptt_jax import ModelConfig


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(fields)
    # Absent means 4,096 tokens here, and null means no window.
    window = fields.integer("sliding_window", None) if "sliding_window" in fields.raw else 4096
    positions = fields.integer("max_position_embeddings", 131_072)
    return ModelConfig(
        **sizes,
        layer_kinds=() if window is None else ("sliding",) * sizes["num_layers"],
        sliding_window=window,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=read_flat_rope(fields, 10_000.0, positions),
        max_positions=positions,
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        "rope_parameters": write_rope(config.rope),
    }


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
)
