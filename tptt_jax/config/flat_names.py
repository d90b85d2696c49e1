"""A model's settings under flat names: files have them, and `ModelConfig` had no parts once."""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from tptt_jax.config.attention import AttentionConfig
from tptt_jax.config.layer_sizes import LayerSizes
from tptt_jax.config.mlp import ExpertsConfig, MlpConfig
from tptt_jax.config.norm import NormConfig

Config = TypeVar("Config")

PARTS: dict[str, type] = {
    "per_layer": LayerSizes,
    "mlp": MlpConfig,
    "experts": ExpertsConfig,
    "norm": NormConfig,
    "attention": AttentionConfig,
}
"""The parts of a ModelConfig."""
FLAT_NAMES: dict[str, tuple[str, str]] = {
    "num_heads_per_layer": ("per_layer", "num_heads"),
    "num_kv_heads_per_layer": ("per_layer", "num_kv_heads"),
    "mlp_dim_per_layer": ("per_layer", "mlp_dim"),
    "activation": ("mlp", "activation"),
    "gated_mlp": ("mlp", "gated"),
    "num_experts": ("experts", "number"),
    "experts_per_token": ("experts", "per_token"),
    "normalize_expert_weights": ("experts", "normalize_weights"),
    "norm": ("norm", "kind"),
    "norm_eps": ("norm", "eps"),
    "norm_weight": ("norm", "weight"),
    "norm_bias": ("norm", "bias"),
    "norm_offset": ("norm", "offset"),
    "norm_float32": ("norm", "float32"),
    "norm_placement": ("norm", "placement"),
    "qk_norm": ("attention", "qk_norm"),
    "clip_qkv": ("attention", "clip_qkv"),
    "fused_qkv": ("attention", "fused_qkv"),
    "attention_bias": ("attention", "bias"),
    "attention_out_bias": ("attention", "out_bias"),
    "mlp_bias": ("mlp", "bias"),
    "query_scale": ("attention", "query_scale"),
    "attention_softcap": ("attention", "softcap"),
}
"""Flat name -> part and field, in the order of files. Files never have other names, so a new field
of a part needs a line here."""


def place_of(name: str) -> tuple[str, ...]:
    """Where a flat name is now: part and field, or the name itself."""
    return FLAT_NAMES.get(name, (name,))


def flat_fields(config_class: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of `ModelConfig`, those of its parts under their flat names, in files' order."""
    own: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(config_class)}
    inner = {
        name: PARTS[part].__dataclass_fields__[field] for name, (part, field) in FLAT_NAMES.items()
    }
    result: dict[str, dataclasses.Field[Any]] = {}
    for name, field in own.items():
        result |= inner if name in PARTS else {name: field}
    return result


def flat_settings(config: Any) -> dict[str, Any]:
    """A configuration as `dataclasses.asdict` gives it, its parts under their flat names."""
    values = dataclasses.asdict(config)
    names = flat_fields(type(config))
    return {name: functools.reduce(operator.getitem, place_of(name), values) for name in names}


def nest_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ModelConfig`, some under flat names, with the parts that these belong to.

    Args:
      values: arguments; a flat name changes that field of a part given as well.
    """
    result = {name: value for name, value in values.items() if not _is_flat(name, value)}
    changes: dict[str, dict[str, Any]] = {}
    for name in values.keys() - result.keys():
        part, field = FLAT_NAMES[name]
        changes.setdefault(part, {})[field] = values[name]
    for part, fields in changes.items():
        result[part] = dataclasses.replace(result.get(part, PARTS[part]()), **fields)
    return result


def _is_flat(name: str, value: Any) -> bool:
    """Whether an argument has an old name; `norm` is both an old name and a part."""
    return name in FLAT_NAMES and not isinstance(value, PARTS.get(name, ()))


def accept_flat_names(config_class: type[Config]) -> type[Config]:
    """Lets `ModelConfig` be built and read under flat names, with a DeprecationWarning."""
    plain_init: Any = config_class.__init__

    @functools.wraps(plain_init)
    def init(self: Any, **values: Any) -> None:
        for name, value in values.items():
            if _is_flat(name, value):
                _warn(name)
        plain_init(self, **nest_settings(values))

    def read(self: Any, name: str) -> Any:
        if name not in FLAT_NAMES or name in PARTS:
            raise AttributeError(f"{type(self).__name__} has no field {name}.", name=name, obj=self)
        _warn(name)
        return functools.reduce(getattr, place_of(name), self)

    # Not written in the class: type checkers shall report flat names.
    config_class.__init__ = init
    setattr(config_class, "__getattr__", read)  # noqa: B010
    return config_class


def _warn(name: str) -> None:
    part, field = FLAT_NAMES[name]
    warnings.warn(
        f"{name} of ModelConfig is deprecated: give {part}={PARTS[part].__name__}({field}=...) and "
        f"read config.{part}.{field}.",
        DeprecationWarning,
        stacklevel=3,
    )
