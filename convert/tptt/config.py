"""config.json of a directory by `save_pretrained` of tptt 0.12.1."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.adapters.config import AdapterConfig, parse_adapter_config
from convert.errors import ConversionError
from convert.families.fields import Fields
from convert.formats.files import read_json
from tptt_jax import LizaConfig
from tptt_jax.config import OPERATORS

MODEL_TYPE = "tptt"
_CONFIG = "config.json"
# tptt's names and ours.
TRICKS = {"dt": "derivative", "rot": "rotary", "rdt": "combined"}
GATES = {"k": "k", "v": "v", "kv": "kv", "c": "constant"}
# Modules whose names end so are wrapped; the original module moves into "base_attn".
_ATTENTION = ("attn", "self_attn", "attention")
_WRAPPED = "base_attn"


@dataclass(frozen=True, kw_only=True)
class TpttConfig:
    """The relevant settings of its config.json."""

    base: str
    """The base model: a hub id, or a path on the machine that trained it."""
    subfolder: str | None
    """Folder of the base model inside `base`."""
    liza: LizaConfig
    adapter: AdapterConfig | None
    """Its LoRA adapters; None: whole weights were trained."""


class WrappedAdapterConfig(AdapterConfig):
    """An adapter with module names of tptt's model."""

    def selects(self, module: str) -> bool:
        """Whether a module of the plain base model is adapted."""
        return super().selects(wrapped_name(module))


def wrapped_name(name: str) -> str:
    """Turns model.layers.0.self_attn.q_proj into model.layers.0.self_attn.base_attn.q_proj."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part in _ATTENTION), None)
    return name if place is None else ".".join([*parts[: place + 1], _WRAPPED, *parts[place + 1 :]])


def plain_name(name: str) -> str:
    """The inverse of `wrapped_name`."""
    return name.replace(f".{_WRAPPED}.", ".")


def is_tptt(path: Path) -> bool:
    """Whether a path is a tptt directory."""
    file = path / _CONFIG
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def read_tptt_config(directory: Path) -> TpttConfig:
    """Reads the config.json of a tptt directory.

    Args:
      directory: the directory.

    Returns:
      The settings.

    Raises:
      ConversionError: if it is malformed or has unsupported settings.
    """
    path = directory / _CONFIG
    fields = Fields(read_json(path), str(path))
    fields.require("model_type", (MODEL_TYPE,), None)
    fields.require("model_task", ("causal_lm",), "causal_lm")
    fields.require("bidirectional", (False,), False)
    # Ours always computes in at least float32.
    fields.require("linear_precision", ("float32", "bfloat16", "float16"), "float32")
    names = fields.texts("target_modules_names") or list(_ATTENTION)
    if not set(names) <= set(_ATTENTION):
        raise ConversionError(
            f"target_modules_names = {names!r:.200} in {path} is not supported: every layer has a "
            f"memory here, so it must consist of {', '.join(_ATTENTION)}."
        )
    lora = fields.object("lora_config")
    adapter = parse_adapter_config(lora) if lora.raw else None
    return TpttConfig(
        base=fields.text("base_model_name"),
        subfolder=fields.text("base_model_subfolder", None) or None,
        liza=_read_liza(fields),
        adapter=None if adapter is None else WrappedAdapterConfig(**vars(adapter)),
    )


def _read_liza(fields: Fields) -> LizaConfig:
    window = fields.integer("max_self_attn_length", None) or None
    scaled = fields.boolean("base_scale_attn", False)
    try:
        return LizaConfig(
            writes="all",
            operator="tptt_reference",
            **_read_recurrence(fields),
            mag="scheduled",
            mag_init=fields.number("mag_weight", 0.5),
            linear_scale="projected" if scaled else "unit",
            cross_gate=fields.boolean("cross_gate", False),
            chunk_size=fields.integer("max_chunk_size", 64),
            softmax_window=window,
            softmax_sinks=4 if window is None else 0,
        )
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{fields.origin} describes an impossible memory: {error}") from None


def _read_recurrence(fields: Fields) -> dict[str, Any]:
    """The mode's rule, which the package also prefers; else the explicit one."""
    mode = fields.text("operator_mode", None)
    if mode is not None:
        if mode not in OPERATORS:
            raise ConversionError(
                f"operator_mode {mode!r:.100} in {fields.origin} is unknown; tptt 0.12.1 has "
                f"{', '.join(OPERATORS)}."
            )
        return dict(OPERATORS[mode])
    saved = fields.object("recurrent_config")
    rule = fields if fields.raw.get("order") is not None or not saved.raw else saved
    return {
        "num_householder": rule.integer("order"),
        "trick": _translate(rule, "trick", TRICKS),
        "beta_gate": _translate(rule, "beta_gate", GATES),
        "alpha_gate": _translate(rule, "alpha_gate", GATES),
        "state_activation": "none" if rule.boolean("linear", True) else "gelu",
    }


def _translate(fields: Fields, key: str, names: Mapping[str, str]) -> str:
    value = fields.text(key)
    if value not in names:
        raise ConversionError(
            f"{key} = {value!r:.100} in {fields.origin} is not supported; it must be "
            f"{' or '.join(names)}."
        )
    return names[value]
