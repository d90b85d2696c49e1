"""Mistral: Llama with a window in every layer, or in none."""

from typing import Any

from convert.families.family import Family
from convert.families.fields import Fields, read_num_layers
from convert.families.key_tables import standard_rules
from convert.families.standard import read_standard, write_old_standard, write_standard
from tptt_jax import ModelConfig


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu",), "silu")
    # Absent means 4,096 tokens here, and null means no window.
    window = fields.integer("sliding_window", None) if "sliding_window" in fields.raw else 4096
    windowed = 0 if window is None else read_num_layers(fields)
    return read_standard(
        fields,
        max_positions=131_072,
        layer_kinds=("sliding",) * windowed,
        sliding_window=window,
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {**write_standard(config), "sliding_window": config.sliding_window}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    write_old_config=write_old_standard,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
)
