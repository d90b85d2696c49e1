"""Writing a model as a Hugging Face directory: plain, or with its memory."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.errors import ConversionError
from convert.families import Family, family_of, titan
from convert.formats import TensorSpec, write_weights
from convert.formats.files import read_json, write_json
from convert.formats.finite_values import check_finite
from convert.loading import Variables, is_base, plan_for, variables_of
from convert.plan import Conversion, Slot
from convert.progress import track
from convert.sources import Pretrained, Source
from convert.sources.opening import TOKEN_KEYS
from convert.sources.source_files import is_own_file, refuse_outer_link, report_skipped_files
from convert.tokenizers import export_tokenizer, tokenizer_class_of
from tptt_jax import CausalLM, ModelConfig
from tptt_jax.array_typing import Array
from tptt_jax.config import RopeConfig


def write_merged(
    model: CausalLM, directory: Path, base: Pretrained | None, tokenizer: Source | None = None
) -> None:
    """Writes the model without its memory, its adapters merged into the weights.

    Args:
      model: the model.
      directory: an existing, empty directory.
      base: source of the model; its unknown settings and generation settings are copied.
      tokenizer: source of the tokenizer, as `load_tokenizer` takes it; None: `base`.

    Raises:
      ConversionError: if the family cannot express the model's configuration, a weight is NaN
        or infinite, or config.json or tokenizer.json is a link out of the model's folder.
    """
    if base is not None and base.path.is_dir():
        # An outer link may point to any file, and its content would be exported.
        refuse_outer_link(base.path / "config.json", base.path)
    family = family_of(model.config.family)
    content = _config_json(family, model.config, np.dtype(model.dtype), base)
    variables = variables_of(model)
    plan = plan_for(family.rules(model.config), model, variables)
    # The source's code is never exported, so nothing may refer to it.
    content.pop("auto_map", None)
    _write_tokenizer(directory, base, tokenizer)
    _write_directory(model, directory, base, content, plan, variables)


def check_titan(model: CausalLM) -> None:
    """Raises ConversionError if the "titan" file cannot run a model; nothing is computed."""
    config, liza = model.config, model.liza
    if config.fixed_up_to is not None:
        raise ConversionError(
            f"the rotary frequencies of this model change beyond {config.fixed_up_to} tokens, "
            'which the "titan" file cannot do: fix them for the longest text, with --context '
            "TOKENS, or export tptt_jax.fix_context(model, tokens)."
        )
    if liza is not None and liza.operator == "tptt_reference":
        raise ConversionError(
            'operator "tptt_reference" is not in the "titan" file; use format "tptt".'
        )


def write_titan(
    model: CausalLM, directory: Path, base: Pretrained | None, tokenizer: Source | None = None
) -> None:
    """Writes the model with its memory and the PyTorch file that runs it.

    Args:
      model: the model; its adapters are merged into the weights.
      directory: an existing, empty directory.
      base: source of the model; its generation settings are copied.
      tokenizer: source of the tokenizer, as `load_tokenizer` takes it; None: `base`.

    Raises:
      ConversionError: if the memory has the reference's operator, rotary frequencies depend on
        the length of the text, or a weight is NaN or infinite.
    """
    check_titan(model)
    config, liza = model.config, model.liza
    variables = variables_of(model)
    plan = plan_for(titan.FAMILY.rules(config), model, variables, memory=True)
    content = titan.FAMILY.config_json(config) | {
        "auto_map": titan.AUTO_MAP,
        "dtype": np.dtype(model.dtype).name,
        "liza": None if liza is None else dataclasses.asdict(liza),
    }
    _write_tokenizer(directory, base, tokenizer)
    if _lacks_tokenizer_class(directory):
        content["tokenizer_class"] = tokenizer_class_of(config.family)
    _write_directory(model, directory, base, content, plan, variables)
    code = resources.files("convert") / "titan" / titan.MODELING_FILE
    (directory / titan.MODELING_FILE).write_bytes(code.read_bytes())


def _write_tokenizer(directory: Path, base: Pretrained | None, tokenizer: Source | None) -> None:
    if base is None:
        return
    export_tokenizer(base.path if tokenizer is None else tokenizer, directory)
    if base.path.is_dir():
        report_skipped_files(base.path)


def _lacks_tokenizer_class(directory: Path) -> bool:
    """Whether the tokenizer files name no class, so that it depends on the model type."""
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and "tokenizer_class" not in read_json(settings)


def _write_directory(
    model: CausalLM,
    directory: Path,
    base: Pretrained | None,
    content: dict[str, Any],
    plan: Sequence[Conversion],
    variables: Variables,
) -> None:
    """Writes configuration, generation settings and weights."""
    specs = [
        TensorSpec(name, shape, _stored_dtype(move, model, variables))
        for move in plan
        for name, shape in zip(move.sources, move.source_shapes, strict=True)
    ]
    write_json(directory / "config.json", content)
    write_json(directory / "generation_config.json", _generation_json(content, base))
    tensors = _merged_tensors(model, plan, variables)
    write_weights(directory, specs, check_finite(specs, tensors))


def _stored_dtype(move: Conversion, model: CausalLM, variables: Variables) -> np.dtype:
    """Base weights have the model's dtype, even if training holds them in float32."""
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
        # Fixed for one length: drop settings of the old scaling.
        kept.pop("rope_parameters", None)
    if base is not None and config.eos_token_ids == base.config.eos_token_ids:
        # Without the end tokens of generation_config.json, which is copied.
        content |= {"eos_token_id": original.get("eos_token_id")}
    # null is not the same as left out: the latter lets transformers fill in a token.
    unnamed = [key for key in TOKEN_KEYS if key not in original and content.get(key) is None]
    for key in unnamed:
        content.pop(key, None)
    return _merge(kept, content)


def _ropes(config: ModelConfig) -> tuple[RopeConfig, RopeConfig]:
    return config.rope_of("full"), config.rope_of("sliding")


def _merge(original: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys override the original ones, also in nested objects such as rope_parameters."""
    result = {**original, **ours}
    for key in original.keys() & ours.keys():
        if isinstance(original[key], dict) and isinstance(ours[key], dict):
            result[key] = _merge(original[key], ours[key])
    return result


def _generation_json(config: Mapping[str, Any], base: Pretrained | None) -> dict[str, Any]:
    if base is not None:
        original = base.path / "generation_config.json"
        if is_own_file(original, base.path):
            return read_json(original)
    known = {key: config[key] for key in TOKEN_KEYS if config.get(key) is not None}
    return {"_from_model_config": True, **known}


def _merged_tensors(
    model: CausalLM, plan: Sequence[Conversion], variables: Variables
) -> Iterator[np.ndarray]:
    scale = 0.0 if model.lora is None else model.lora.scale
    sizes = [sum(prod(slot.shape) for slot in move.slots) for move in plan]
    for move in track(plan, "Writing weights", sizes):
        dtype = _stored_dtype(move, model, variables)
        # A value too large for float16 becomes Inf, which the export refuses.
        with np.errstate(over="ignore"):
            merged = [_merged(slot, variables, scale).astype(dtype) for slot in move.slots]
        ours = [np.asarray(each) for each in merged]
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
