"""Writing LoRA adapters for PEFT."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.adapters.config import CONFIG_FILE, WEIGHTS_FILE, Modules, matches
from convert.adapters.module_names import weighted_modules
from convert.adapters.places import Place, places_of
from convert.errors import ConversionError, listing
from convert.families import Family, family_of, titan
from convert.formats import TensorSpec, write_safetensors
from convert.formats.files import read_json, write_json
from convert.formats.finite_values import check_finite
from convert.loading import Variables, variables_of
from convert.rules import Rule
from convert.sources import parse_hub_name
from tptt_jax import CausalLM, LoraConfig


def check_adapter(
    model: CausalLM, base: str | None
) -> tuple[list[Place], Variables, Family | None]:
    """Raises ConversionError if PEFT cannot hold a model's adapters; nothing is computed.

    Returns:
      Places of the adapters, the model's variables, and the family of a "titan" base.
    """
    if model.lora is None:
        raise ConversionError(
            "the model has no LoRA adapters, so there is nothing to write as peft; use format "
            '"merged", or load the model with a LoraConfig.'
        )
    variables = variables_of(model)
    adapted = {name.removesuffix(".lora.a") for name in variables if name.endswith(".lora.a")}
    family = _titan_of(base)
    places = places_of(model.config, variables, family)
    if lost := adapted - {place.path for place in places}:
        raise ConversionError(
            f"{listing(lost)} have adapters but are not separate modules in Hugging Face's "
            'model, so peft cannot hold them; use format "merged".'
        )
    return places, variables, family


def write_adapter(model: CausalLM, directory: Path, base: str | None) -> None:
    """Writes a model's LoRA adapters for PEFT, bit for bit.

    Layers whose a and b are zero have no adapter (see `FittedAdapter.load_into`) and get none.

    Args:
      model: the model; its memory is left out.
      directory: an existing, empty directory.
      base: value of base_model_name_or_path.

    Raises:
      ConversionError: if the model has no adapters, has adapters on projections that are not
        separate modules in Hugging Face's model, or has values that are NaN or infinite.
    """
    places, variables, family = check_adapter(model, base)
    assert model.lora is not None, "check_adapter refuses what has no adapters"
    tensors = {place: stored_pair(place, variables) for place in places}
    tensors = {place: pair for place, pair in tensors.items() if any(x.any() for x in pair)}
    if not tensors:
        raise ConversionError("the model's LoRA adapters are all zero; there is nothing to write.")
    rules = (family or family_of(model.config.family)).rules(model.config)
    modules = [place.module for place in tensors]
    others = weighted_modules(rules, model.config) - set(modules)
    config = adapter_config_json(
        model.lora,
        target_modules(modules, others),
        base=base,
        fan_in_fan_out=is_conv1d(rules, tensors),
    )
    write_json(directory / CONFIG_FILE, config)
    named = [
        (TensorSpec(name, array.shape, array.dtype), array)
        for place, pair in tensors.items()
        for name, array in zip(place.tensors, pair, strict=True)
    ]
    specs, arrays = zip(*named, strict=True)
    write_safetensors(directory / WEIGHTS_FILE, specs, check_finite(specs, arrays))


def _titan_of(base: str | None) -> Family | None:
    """The family of a "titan" export, if that is the base model."""
    file = Path(base or "") / "config.json"
    is_titan = (
        base is not None
        and file.is_file()
        and read_json(file).get("model_type") == titan.MODEL_TYPE
    )
    return titan.FAMILY if is_titan else None


def stored_pair(place: Place, variables: Variables) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [rank, in] and lora_B [out, rank]."""
    a, b = (variables[f"{place.path}.lora.{part}"][1].get_value()[place.index] for part in "ab")
    return np.asarray(a).T, np.asarray(b).T


def is_conv1d(rules: Iterable[Rule], places: Iterable[Place]) -> bool:
    """Whether the adapted weights are stored [in, out], as GPT-2 has them."""
    kernels = {f"layers.{{layer}}.{place.target}.kernel" for place in places}
    found = [rule for rule in rules if kernels.intersection(rule.targets)]
    return all(tuple(rule.transform.stored_shapes([(2, 3)])[0]) == (2, 3) for rule in found)


def adapter_config_json(
    lora: LoraConfig, modules: Modules, *, base: str | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The content of an adapter_config.json, ready for inference.

    Args:
      lora: rank, scale and dropout.
      modules: modules to adapt (see `target_modules`).
      base: the base model; None: unknown.
      fan_in_fan_out: whether the base stores its adapted weights [in, out] (GPT-2's Conv1D).

    Returns:
      The JSON object.
    """
    hub = None if base is None or Path(base).exists() else parse_hub_name(base)
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base if hub is None else hub.name,
        "revision": None if hub is None else hub.revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": modules if isinstance(modules, str) else list(modules),
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def target_modules(adapted: Sequence[str], others: Collection[str]) -> Modules:
    """Selects exactly these modules in PEFT's terms.

    Args:
      adapted: the modules to adapt.
      others: the other modules of the model that have weights.

    Returns:
      The shortest names that select them; one regular expression if names cannot, because only
      some layers are adapted.
    """
    names: list[str] = []
    for module in adapted:
        if matches(tuple(names), module):
            continue
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        name = next((end for end in ends if not any(matches((end,), x) for x in others)), module)
        if any(part.isdecimal() for part in name.split(".")):
            return _expression(adapted)
        names.append(name)
    return tuple(names)


def _expression(modules: Iterable[str]) -> str:
    """A regular expression that matches exactly these names, with grouped layer numbers."""
    layers: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        start, number, end = _split_at_number(module)
        layers.setdefault((start, end), []).append(number)
    ends: dict[tuple[str, str], list[str]] = {}
    for (start, end), numbers in layers.items():
        ends.setdefault((start, "|".join(numbers)), []).append(re.escape(end))
    return "|".join(
        f"{re.escape(start)}(?:{numbers})(?:{'|'.join(group)})"
        for (start, numbers), group in ends.items()
    )


def _split_at_number(module: str) -> tuple[str, str, str]:
    """Splits a name as model.layers. + 3 + .mlp.up_proj."""
    start, number, end = re.split(r"(\d+)", module, maxsplit=1)
    return start, number, end
