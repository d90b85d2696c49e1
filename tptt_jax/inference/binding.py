"""What binds a saved state to its model: a hash of the weights, and every setting by its name."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax.config import (
    LizaConfig,
    LoraConfig,
    ModelConfig,
    RopeConfig,
    flat_fields,
    flat_settings,
)
from tptt_jax.model import CausalLM

Settings = dict[str, Any]
"""Settings as JSON values, by names such as "model.rope.theta" and "liza.softmax_window"; the name
"liza" or "lora" alone is None where a model has none."""

_CONFIGS: dict[str, type] = {"model": ModelConfig, "liza": LizaConfig, "lora": LoraConfig}
_ROPES = ("rope", "sliding_rope")
_SHOWN = 3
# What states of format 1 always hash; later settings are hashed unless they have their default.
_FIRST = {
    "model": """
        family vocab_size embed_dim num_layers num_heads num_kv_heads head_dim mlp_dim
        num_heads_per_layer num_kv_heads_per_layer mlp_dim_per_layer activation gated_mlp
        num_experts experts_per_token normalize_expert_weights norm norm_eps norm_weight norm_bias
        norm_offset norm_float32 norm_placement qk_norm clip_qkv fused_qkv attention_bias
        attention_out_bias mlp_bias query_scale attention_softcap final_softcap scale_embeddings
        tie_embeddings layer_kinds sliding_window position_embedding rope sliding_rope max_positions
        bos_token_id eos_token_ids pad_token_id""",
    "liza": """
        operator num_householder trick beta_gate alpha_gate state_activation vector_beta
        expand_gates mag mag_init linear_scale cross_gate softmax softmax_window softmax_sinks
        memory_rank memory_alpha dropout chunk_size""",
    "lora": "rank alpha use_rslora dropout targets",
    "rope": "theta scaling factor low_freq_factor high_freq_factor original_max_positions",
}


def hash_weights(model: CausalLM) -> str:
    """SHA-256 of the names, values, shapes and dtypes of all weights, adapters and shares.

    It reads a gigabyte in about a second.

    Args:
      model: any model; its weights may be sharded.

    Returns:
      64 hexadecimal digits, the same in every process and on every device.
    """
    return _sha256(_weight_lines(model))


def model_settings(model: CausalLM) -> Settings:
    """Every setting that determines what a model computes."""
    return _normalized({"dtype": str(jnp.dtype(model.dtype))} | _configs(model))


def parse_settings(text: str | None) -> Settings | None:
    """The settings in a file; None: it has none, or they are damaged."""
    try:
        saved = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return _normalized(saved) if isinstance(saved, dict) and saved else None


def parse_first_settings(text: str | None) -> Settings | None:
    """`parse_settings` for files of format 1."""
    saved = parse_settings(text)
    if saved is None:
        return None
    for name in ("liza", "lora"):
        # A part that the model lacks was named twice.
        if f"{name}.{name}" in saved:
            saved[name] = saved.pop(f"{name}.{name}")
    if "liza.operator" in saved:
        saved.setdefault("liza.writes", "all")
    return saved


def describe_difference(saved: Settings, model: CausalLM) -> str | None:
    """The settings in which a state's model differs from this one; None: they agree.

    Args:
      saved: of the state's model, perhaps from an earlier version: what they do not name has its
        default.
      model: the model that is to continue.
    """
    own, defaults = model_settings(model), _defaults()

    def value(name: str) -> Any:
        parts = name.split(".")
        is_part_of_none = any(".".join(parts[:end]) in saved for end in range(1, len(parts)))
        return saved.get(name, None if is_part_of_none else defaults.get(name))

    names = dict.fromkeys([*saved, *own])
    pairs = [(name, value(name), own.get(name)) for name in names]
    changed = [_difference(*pair) for pair in pairs if pair[1] != pair[2]]
    if not changed:
        return None
    more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return "; ".join(changed[:_SHOWN]) + more


def first_fingerprint(model: CausalLM) -> str:
    """The one hash of weights and settings that binds states of format 1."""
    configs, defaults = _configs(model), _defaults() | {"liza.writes": "all"}
    liza = configs["liza"]
    if liza is not None and liza["precision"] == "highest":
        liza["precision"] = "auto"

    def first(prefix: str, values: dict[str, Any], names: str) -> dict[str, Any]:
        return {
            name: value
            for name, value in values.items()
            if name in names.split() or _to_json(value) != defaults.get(f"{prefix}.{name}")
        }

    parts = {name: part and first(name, part, _FIRST[name]) for name, part in configs.items()}
    for name in _ROPES:
        rope = parts["model"][name]
        parts["model"][name] = rope and first(f"model.{name}", rope, _FIRST["rope"])
    values = [*parts.values(), str(jnp.dtype(model.dtype))]
    return _sha256([*_weight_lines(model), json.dumps(values, sort_keys=True)])


def _configs(model: CausalLM) -> dict[str, Any]:
    configs = {"model": model.config, "liza": model.liza, "lora": model.lora}
    return {
        name: None if config is None else flat_settings(config) for name, config in configs.items()
    }


def _defaults() -> Settings:
    """The defaults of all settings that have one."""
    found: Settings = {}
    for name, kind in _CONFIGS.items():
        for key, field in flat_fields(kind).items():
            if field.default is not dataclasses.MISSING:
                found[f"{name}.{key}"] = field.default
    rope = dataclasses.asdict(RopeConfig())
    found |= {f"model.{name}.{key}": value for name in _ROPES for key, value in rope.items()}
    return _to_json(found)


def _difference(name: str, saved: Any, own: Any) -> str:
    before, now = ("none" if x is None else f"{x!s:.40}" for x in (saved, own))
    if before == now:
        return f"{name}: other values in the state than in the model"
    return f"{name}: {before} in the state, {now} in the model"


def _normalized(nested: Mapping[str, Any]) -> Settings:
    settings = _flatten(_to_json(nested))
    if settings.get("liza.precision") == "highest":
        settings["liza.precision"] = "auto"  # computes the same
    return settings


def _to_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Settings:
    flat: Settings = {}
    for key, value in values.items():
        name = f"{prefix}.{key}".strip(".")
        flat |= _flatten(value, name) if isinstance(value, dict) else {name: value}
    return flat


def _weight_lines(model: CausalLM) -> list[str]:
    """One line for each variable, in the order of their names."""
    variables = nnx.to_flat_state(nnx.state(model))
    named = sorted((".".join(map(str, path)), variable) for path, variable in variables)

    def digest(item: tuple[str, Any]) -> str:
        name, variable = item
        value = np.ascontiguousarray(variable.get_value())
        # hashlib lets other threads run while it works.
        content = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        return f"{name} {value.dtype} {value.shape} {content}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, named))


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
