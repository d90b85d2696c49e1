"""Writing a model as a Hugging Face directory: plain, or with its memory."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.errors import ConversionError
from convert.families import Family, family_of, titan
from convert.files import read_json, write_json
from convert.hf_directory import write_weights
from convert.loading import Variables, is_base, plan_for, variables_of
from convert.plan import Conversion, Slot
from convert.progress import track
from convert.safetensors_io import TensorSpec
from convert.sources import Pretrained
from convert.tokenizer import export_tokenizer, tokenizer_class_of
from tptt_jax import CausalLM, ModelConfig
from tptt_jax.array_typing import Array
from tptt_jax.config import RopeConfig


def write_merged(model: CausalLM, directory: Path, base: Pretrained | None) -> None:
    """Writes the model without its memory, its adapters merged into the weights.

    Args:
      model: the model.
      directory: an existing, empty directory.
      base: what the model was loaded from; its unknown settings, generation settings and
        tokenizer go along.

    Raises:
      ConversionError: if the family cannot express the model's configuration.
    """
    family = family_of(model.config.family)
    content = _config_json(family, model.config, np.dtype(model.dtype), base)
    variables = variables_of(model)
    plan = plan_for(family.rules(model.config), model, variables)
    if base is not None:
        _copy_code(base.path, directory, content)
    _write_directory(model, directory, base, content, plan, variables)


def write_titan(model: CausalLM, directory: Path, base: Pretrained | None) -> None:
    """Writes the model with its memory and the PyTorch file that runs it.

    Args:
      model: the model; its adapters are merged into the weights.
      directory: an existing, empty directory.
      base: what the model was loaded from; its generation settings and tokenizer go along.

    Raises:
      ConversionError: if the memory has the reference's operator, or rotary frequencies depend on
        the length of the text.
    """
    config, liza = model.config, model.liza
    if config.fixed_up_to is not None:
        raise ConversionError(
            f"the rotary frequencies of this model change beyond {config.fixed_up_to} tokens, "
            'which the "titan" file cannot do: export tptt_jax.fix_context(model, tokens), fixed '
            "for the longest text."
        )
    if liza is not None and liza.operator == "tptt_reference":
        raise ConversionError(
            'operator "tptt_reference" is not in the "titan" file; use format "tptt".'
        )
    variables = variables_of(model)
    plan = plan_for(titan.FAMILY.rules(config), model, variables, memory=True)
    content = titan.FAMILY.config_json(config) | {
        "auto_map": titan.AUTO_MAP,
        "dtype": np.dtype(model.dtype).name,
        "liza": None if liza is None else dataclasses.asdict(liza),
    }
    if tokenizer_class := _missing_tokenizer_class(base, config.family):
        content["tokenizer_class"] = tokenizer_class
    _write_directory(model, directory, base, content, plan, variables)
    code = resources.files("convert") / "titan" / titan.MODELING_FILE
    (directory / titan.MODELING_FILE).write_bytes(code.read_bytes())


def _missing_tokenizer_class(base: Pretrained | None, model_type: str) -> str | None:
    """The class of a tokenizer whose own files leave it to the base model's type."""
    if base is None:
        return None
    settings = base.path / "tokenizer_config.json"
    if not settings.is_file() or "tokenizer_class" in read_json(settings):
        return None
    return tokenizer_class_of(model_type)


def _write_directory(
    model: CausalLM,
    directory: Path,
    base: Pretrained | None,
    content: dict[str, Any],
    plan: Sequence[Conversion],
    variables: Variables,
) -> None:
    """Writes configuration, generation settings, tokenizer and weights."""
    specs = [
        TensorSpec(name, shape, _stored_dtype(move, model, variables))
        for move in plan
        for name, shape in zip(move.sources, move.source_shapes, strict=True)
    ]
    write_json(directory / "config.json", content)
    write_json(directory / "generation_config.json", _generation_json(content, base))
    if base is not None:
        export_tokenizer(base.path, directory)
    write_weights(directory, specs, _merged_tensors(model, plan, variables))


def _stored_dtype(move: Conversion, model: CausalLM, variables: Variables) -> np.dtype:
    """Base weights have the model's dtype, also where training holds them in float32."""
    variable = variables[move.slots[0].path][1]
    return np.dtype(model.dtype if is_base(variable) else variable.get_value().dtype)


def _config_json(
    family: Family, config: ModelConfig, dtype: np.dtype, base: Pretrained | None
) -> dict[str, Any]:
    content = family.config_json(config) | family.write_old_config(config)
    content |= {"dtype": dtype.name, "torch_dtype": dtype.name}
    original = None if base is None else base.config_json
    if original is None or original.get("model_type") != family.model_type:
        return content
    kept = {key: value for key, value in original.items() if key not in family.superseded}
    if base is not None and _ropes(config) != _ropes(base.config):
        # Fixed for a length: settings of the old scaling do not belong to the new one.
        kept.pop("rope_parameters", None)
    if base is not None and config.eos_token_ids == base.config.eos_token_ids:
        # Without those that generation_config.json adds, which goes along.
        content |= {"eos_token_id": original.get("eos_token_id")}
    return _merge(kept, content)


def _ropes(config: ModelConfig) -> tuple[RopeConfig, RopeConfig]:
    return config.rope_of("full"), config.rope_of("sliding")


def _copy_code(source: Path, directory: Path, content: dict[str, Any]) -> None:
    """The code that config.json refers to (OpenELM's) goes along; it is never run here."""
    if "auto_map" not in content:
        return
    files = sorted(source.glob("*.py"))
    for file in files:
        shutil.copyfile(file, directory / file.name)
    if not files:
        # A reference to files that are not there would keep the export from loading at all.
        del content["auto_map"]


def _merge(original: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Ours over the original, also inside nested objects such as rope_parameters."""
    result = {**original, **ours}
    for key in original.keys() & ours.keys():
        if isinstance(original[key], dict) and isinstance(ours[key], dict):
            result[key] = _merge(original[key], ours[key])
    return result


def _generation_json(config: Mapping[str, Any], base: Pretrained | None) -> dict[str, Any]:
    if base is not None:
        original = base.path / "generation_config.json"
        if original.is_file():
            return read_json(original)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {key: config[key] for key in ids if config.get(key) is not None}
    return {"_from_model_config": True, **known}


def _merged_tensors(
    model: CausalLM, plan: Sequence[Conversion], variables: Variables
) -> Iterator[np.ndarray]:
    scale = 0.0 if model.lora is None else model.lora.scale
    sizes = [sum(prod(slot.shape) for slot in move.slots) for move in plan]
    for move in track(plan, "Writing weights", sizes):
        dtype = _stored_dtype(move, model, variables)
        ours = [np.asarray(_merged(slot, variables, scale).astype(dtype)) for slot in move.slots]
        yield from move.transform.backward(ours)


def _merged(slot: Slot, variables: Variables, scale: float) -> Array:
    """One weight with its adapter, if it has one, added in float32."""

    def layer(path: str) -> Array:
        value = variables[path][1].get_value()
        return value[slot.index]

    weight = layer(slot.path)
    adapter = slot.path.removesuffix(".kernel") + ".lora"
    if f"{adapter}.a" not in variables:
        return weight
    delta = jnp.matmul(layer(f"{adapter}.a"), layer(f"{adapter}.b"), precision="highest")
    return weight.astype(jnp.float32) + scale * delta
