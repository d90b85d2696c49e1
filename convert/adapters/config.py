"""adapter_config.json: the settings of a PEFT LoRA adapter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, listing
from convert.families.fields import Fields
from convert.formats.files import read_json
from tptt_jax import LoraConfig
from tptt_jax.config.patterns import check_pattern, matches_whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MERGE_REMEDY = (
    "peft can merge it: PeftModel.from_pretrained(BASE_MODEL, DIR).merge_and_unload()"
    ".save_pretrained(OTHER_DIR) writes a plain model that loads here"
)
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "base_model_name_or_path", "revision"),
}
# Settings without effect on a trained adapter.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "inference_mode", "peft_version", "fan_in_fan_out"),
    *("megatron_config", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}
# Other initialisations also change the base weights, so the adapter alone is not the model.
_INITIALISATIONS = ("true", "false", "none", "gaussian", "eva", "orthogonal")

Modules = str | tuple[str, ...]
"""One regular expression of whole module names, or names (or the ends of names) of modules."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The relevant settings of an adapter_config.json."""

    base: str | None
    """The base model: a hub id, or a path on the machine that trained it."""
    revision: str | None
    """Revision of the base model on the hub."""
    lora: LoraConfig
    """Rank, scale and dropout, without targets, as those depend on the base model."""
    target_modules: Modules
    exclude_modules: Modules

    def selects(self, module: str) -> bool:
        """Whether PEFT adapts the module of this name, e.g. "model.layers.0.mlp.up_proj"."""
        if matches(self.exclude_modules, module):
            return False
        # "all-linear" never includes the head.
        is_all = self.target_modules == "all-linear" and module != "lm_head"
        return is_all or matches(self.target_modules, module)


def matches(modules: Modules, name: str) -> bool:
    """Whether a module is selected, by PEFT's rules.

    Raises:
      ConversionError: if a regular expression takes too long to match.
    """
    if isinstance(modules, str):
        try:
            return matches_whole(modules, name)
        except ValueError as error:
            raise ConversionError(f"The modules of the adapter cannot be found: {error}") from None
    return any(name == each or name.endswith(f".{each}") for each in modules)


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT directory."""
    return (path / CONFIG_FILE).is_file()


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Reads the adapter_config.json of a PEFT directory.

    Args:
      directory: the directory.

    Returns:
      The settings.

    Raises:
      ConversionError: if it is absent or malformed, is not of a LoRA adapter, or has unsupported
        settings; the message names all of them.
    """
    path = directory / CONFIG_FILE
    return parse_adapter_config(Fields(read_json(path), str(path)))


def parse_adapter_config(fields: Fields) -> AdapterConfig:
    """`read_adapter_config` for parsed settings."""
    path = fields.origin
    kind = fields.text("peft_type")
    if kind != "LORA":
        raise ConversionError(
            f'{path} describes an adapter of peft_type {kind!r}, only "LORA" is supported; '
            f"{MERGE_REMEDY}."
        )
    _check_settings(path, fields.raw)
    targets = _read_modules(fields, "target_modules")
    if not targets:
        raise ConversionError(
            f"target_modules in {path} names nothing; it must be a list of module names, a "
            'regular expression or "all-linear".'
        )
    return AdapterConfig(
        base=fields.text("base_model_name_or_path", None) or None,
        revision=fields.text("revision", None) or None,
        lora=_read_lora(fields),
        target_modules=targets,
        exclude_modules=_read_modules(fields, "exclude_modules"),
    )


def _check_settings(path: str, raw: Mapping[str, Any]) -> None:
    """Refuses every setting that is on, unless we know that it has no effect."""
    asked = {key for key, value in raw.items() if value} - _READ - _WITHOUT_EFFECT
    if raw.get("bias") not in (None, "none"):
        asked.add("bias")
    if str(raw.get("init_lora_weights")).lower() not in _INITIALISATIONS:
        asked.add("init_lora_weights")
    if asked:
        settings = listing(f"{key} = {raw[key]!s:.80}" for key in asked)
        raise ConversionError(
            f"{path} has settings that are not supported: {settings}; {MERGE_REMEDY}."
        )


def _read_modules(fields: Fields, key: str) -> Modules:
    value = fields.raw.get(key)
    if not isinstance(value, str):
        return tuple(fields.texts(key) or ())
    try:
        check_pattern(value)
    except ValueError as error:
        raise ConversionError(f"{key} in {fields.origin} {error}.") from None
    # Like PEFT, treat an empty expression as none.
    return value or ()


def _read_lora(fields: Fields) -> LoraConfig:
    try:
        lora = LoraConfig(
            rank=fields.integer("r", 8),
            alpha=fields.number("lora_alpha", 8.0),
            use_rslora=fields.boolean("use_rslora", False),
            dropout=fields.number("lora_dropout", 0.0),
            targets=(),
        )
        if not math.isfinite(lora.scale):
            raise ValueError(f"lora_alpha = {lora.alpha}.")
        return lora
    except ConversionError:
        raise
    except (ValueError, OverflowError) as error:
        raise ConversionError(f"{fields.origin} describes an impossible adapter: {error}") from None
