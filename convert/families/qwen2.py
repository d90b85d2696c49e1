"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in the upper layers if asked."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import (
    Fields,
    read_layer_kinds,
    read_sizes,
    write_layer_kinds,
    write_sizes,
)
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.rotary import read_flat_rope, write_rope
from convert.gguf_io import GgufFile
from tptt_jax import ModelConfig
from tptt_jax.config import LayerKind


def read_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Which layers have a window, and how wide it is.

    Args:
      fields: a config.json with use_sliding_window, sliding_window, max_window_layers and
        layer_types, as Qwen2 and Qwen3 have them.
      num_layers: of the model.

    Returns:
      Keyword arguments of `ModelConfig`; no window at all unless use_sliding_window is true.
    """
    if not fields.boolean("use_sliding_window", False):
        return {}
    first = fields.integer("max_window_layers", 28)
    default: tuple[LayerKind, ...] = tuple(
        "full" if i < first else "sliding" for i in range(num_layers)
    )
    kinds = read_layer_kinds(fields, default)
    window = fields.integer("sliding_window", 4096) if "sliding" in kinds else None
    return {"layer_kinds": kinds, "sliding_window": window}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": write_layer_kinds(config),
    }


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(fields)
    positions = fields.integer("max_position_embeddings", 32_768)
    return ModelConfig(
        **sizes,
        **read_windows(fields, sizes["num_layers"]),
        attention_bias=True,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=read_flat_rope(fields, 10_000.0, positions),
        max_positions=positions,
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config, implied_head_dim=True),
        **write_windows(config),
        "hidden_act": "silu",
        "rope_parameters": write_rope(config.rope),
    }


def _read_gguf(file: GgufFile) -> ModelConfig:
    return ModelConfig(**read_gguf_common(file), family="qwen2", attention_bias=True)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    gguf=GgufTable(architecture="qwen2", read_config=_read_gguf, rules=gguf_rules),
)
