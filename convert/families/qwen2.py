"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in the upper layers if asked."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import (
    Fields,
    read_layer_kinds,
    read_num_layers,
    write_layer_kinds,
)
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.standard import read_standard, write_old_standard, write_standard
from convert.formats import GgufFile
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, BaseLayerKind

_BIASED = AttentionConfig(bias=True)


def read_windows(fields: Fields) -> dict[str, Any]:
    """Which layers have a window, and how wide it is.

    Args:
      fields: a config.json with use_sliding_window, sliding_window, max_window_layers and
        layer_types, as Qwen2 and Qwen3 have them.

    Returns:
      Keyword arguments of `ModelConfig`; no window at all unless use_sliding_window is true.
    """
    if not fields.boolean("use_sliding_window", False):
        return {}
    first = fields.integer("max_window_layers", 28)
    default: tuple[BaseLayerKind, ...] = tuple(
        "full" if i < first else "sliding" for i in range(read_num_layers(fields))
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


def write_old_windows(config: ModelConfig) -> dict[str, Any]:
    """The published keys: the rotary embedding, and the first layer with a window."""
    content = write_old_standard(config)
    full = config.layer_kinds.count("full")
    if config.layer_kinds[:full] == ("full",) * full and config.sliding_window is not None:
        content["max_window_layers"] = full
    return content


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu",), "silu")
    windows = read_windows(fields)
    return read_standard(fields, max_positions=32_768, **windows, attention=_BIASED)


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {**write_standard(config, implied_head_dim=True), **write_windows(config)}


def _read_gguf(file: GgufFile) -> ModelConfig:
    return ModelConfig(**read_gguf_common(file), family="qwen2", attention=_BIASED)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    write_old_config=write_old_windows,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    gguf=GgufTable(architecture="qwen2", read_config=_read_gguf, rules=gguf_rules),
)
