"""Writes directories that tptt 0.12.1 loads."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from convert.adapters.config import WEIGHTS_FILE
from convert.adapters.export import adapter_config_json, is_conv1d, stored_pair, target_modules
from convert.adapters.module_names import weighted_modules
from convert.adapters.places import Place, places_of
from convert.errors import ConversionError, listing
from convert.families import family_of
from convert.families.rotary import shortest
from convert.formats import TensorSpec, write_safetensors
from convert.formats.files import write_json
from convert.formats.finite_values import check_finite
from convert.loading import Variables, plan_for, variables_of
from convert.plan import Conversion
from convert.sources import Pretrained
from convert.tptt.config import GATES, MODEL_TYPE, TRICKS, wrapped_name
from tptt_jax import CausalLM, LizaConfig
from tptt_jax.config import OPERATORS

# These modules make trust_remote_code use the installed package.
_MODULES = {"configuration_tptt": "TpttConfig", "modeling_tptt": "TpttModel"}


def check_tptt(
    model: CausalLM, base: str | None, pretrained: Pretrained | None
) -> tuple[dict[str, Any], list[Place], Variables]:
    """Raises ConversionError if the package cannot express a model; nothing is computed.

    Returns:
      The memory in the package's terms, places of the adapters, and the model's variables.
    """
    if base is None or pretrained is None:
        raise ConversionError(
            'format "tptt" holds no base model: give the source that the model was loaded from.'
        )
    if pretrained.config_json is None:
        raise ConversionError(
            "tptt loads its base model through transformers, which needs a Hugging Face directory "
            f"or a hub id, but this one is {base}: write it as a directory first (python -m "
            "convert import) and give that as source."
        )
    if pretrained.path != Path(base) and "@" in base:
        raise ConversionError(
            f"tptt loads the main branch of a hub id, but the base model is {base}: write that as "
            "a directory first (python -m convert import) and give it as source."
        )
    memory = _memory_json(model)
    variables = variables_of(model)
    places = places_of(model.config, variables)
    adapted = {name.removesuffix(".lora.a") for name in variables if name.endswith(".lora.a")}
    if lost := adapted - {place.path for place in places}:
        raise ConversionError(
            f"{listing(lost)} have adapters but are not separate modules in Hugging Face's "
            'model, so tptt cannot hold them; use format "merged".'
        )
    return memory, places, variables


def write_tptt(
    model: CausalLM, directory: Path, base: str | None, pretrained: Pretrained | None
) -> None:
    """Writes config.json, adapters and changed weights, for `TpttModel.from_pretrained`.

    Without adapters the attention projections are written whole, as the package does; every other
    weight that differs from the base model's is written in any case.

    Args:
      model: the model.
      directory: an existing, empty directory.
      base: the base model's name for config.json.
      pretrained: the base model, opened.

    Raises:
      ConversionError: if the package cannot express the model, or cannot read the base model, or
        a weight is NaN or infinite.
    """
    memory, places, variables = check_tptt(model, base, pretrained)
    assert pretrained is not None, "check_tptt refuses what has no base model"
    tensors = _adapters(places, variables) | _weights(model, places, pretrained)
    content = {
        "architectures": ["TpttModel"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_tptt.TpttConfig",
            "AutoModelForCausalLM": "modeling_tptt.TpttModel",
        },
        "model_task": "causal_lm",
        "base_model_name": base,
        "base_model_subfolder": None,
        # If omitted, tptt reads it with this model_type, which transformers 5 refuses.
        "base_model_config": pretrained.config_json,
        "linear_precision": np.dtype(model.dtype).name,
        "lora_config": _lora_json(model, places),
        **memory,
    }
    write_json(directory / "config.json", content)
    for module, name in _MODULES.items():
        (directory / f"{module}.py").write_text(f"from tptt import {name}  # noqa: F401\n")
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]
    write_safetensors(directory / WEIGHTS_FILE, specs, check_finite(specs, tensors.values()))


def _memory_json(model: CausalLM) -> dict[str, Any]:
    """The memory in the package's terms."""
    liza = model.liza
    if liza is None or liza.operator != "tptt_reference":
        raise ConversionError(
            'format "tptt" needs operator "tptt_reference", the only one of the package; this '
            f"model has {'no memory' if liza is None else repr(liza.operator)}. Use "
            'format "merged" or "peft".'
        )
    wrong = {
        'mag = "learned"': liza.softmax and liza.mag == "learned",
        'linear_scale = "match"': liza.linear_scale == "match",
        "memory_rank": bool(liza.memory_rank),
        "full_layers": bool(liza.full_layers),
        "softmax_sinks with a softmax_window": liza.softmax_window and liza.softmax_sinks,
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConversionError(
            f"tptt cannot express this model's {listing(found)}; train with "
            "LizaConfig.tptt_reference(...), which sets only supported values."
        )
    share = 1.0 if model.mag_share is None else shortest(float(model.mag_share[...]))
    if not math.isfinite(share):
        raise ConversionError(
            f"The model's mag_share is {share}; nothing was written: export an earlier checkpoint."
        )
    return {
        **_operator_json(liza),
        "max_chunk_size": liza.chunk_size,
        "max_self_attn_length": liza.softmax_window,
        "mag_weight": share,
        "base_scale_attn": liza.linear_scale == "projected",
        "cross_gate": liza.cross_gate,
        "bidirectional": False,
        "padding_side": "right",
    }


def _operator_json(liza: LizaConfig) -> dict[str, Any]:
    """The mode's name, or the explicit rule if it has none."""
    rule = liza.recurrence
    for mode in OPERATORS:
        if LizaConfig.tptt_reference(mode).recurrence == rule:
            return {"operator_mode": mode}
    gates, tricks = ({ours: key for key, ours in names.items()} for names in (GATES, TRICKS))
    return {
        "operator_mode": None,
        "order": rule.num_householder,
        "alpha_gate": gates[rule.alpha_gate],
        "beta_gate": gates[rule.beta_gate],
        "linear": rule.state_activation == "none",
        "trick": tricks[rule.trick],
    }


def _lora_json(model: CausalLM, places: list[Place]) -> dict[str, Any] | None:
    if model.lora is None:
        return None
    rules = family_of(model.config.family).rules(model.config)
    modules = [place.module for place in places]
    others = weighted_modules(rules, model.config) - set(modules)
    chosen = target_modules(
        [wrapped_name(name) for name in modules], {wrapped_name(name) for name in others}
    )
    return adapter_config_json(
        model.lora, chosen, base=None, fan_in_fan_out=is_conv1d(rules, places)
    ) | {"inference_mode": False}


def _adapters(places: list[Place], variables: Any) -> dict[str, np.ndarray]:
    return {
        f"model.{wrapped_name(place.module)}.lora_{part}.default.weight": array
        for place in places
        for part, array in zip("AB", stored_pair(place, variables), strict=True)
    }


def _weights(model: CausalLM, places: list[Place], base: Pretrained) -> dict[str, np.ndarray]:
    """Weights that differ from the base model, which the package must read from here."""
    has_lora = model.lora is not None
    adapted = {place.module for place in places}
    variables = variables_of(model)
    plan = plan_for(base.rules, model, variables)
    tensors = {}
    for move in plan:
        ours = []
        for slot in move.slots:
            value = variables[slot.path][1].get_value()
            ours.append(np.asarray(value[slot.index]))
        if _is_same(move, ours, base) and (has_lora or not _is_projection(move)):
            continue
        for name, array in zip(move.sources, move.transform.backward(ours), strict=True):
            tensors[_stored_name(name, adapted, has_lora)] = np.ascontiguousarray(array)
    return tensors


def _is_same(move: Conversion, ours: list[np.ndarray], base: Pretrained) -> bool:
    prefix, tensors = base.family.prefix, base.tensors.tensors
    names = [name if name in tensors else name.removeprefix(prefix) for name in move.sources]
    stored = [base.tensors.read(name) for name in names]
    theirs = move.transform.forward(stored, [slot.shape for slot in move.slots])
    return all(np.array_equal(x.astype(y.dtype), y) for x, y in zip(theirs, ours, strict=True))


def _is_projection(move: Conversion) -> bool:
    return any(".self_attn." in slot.path and "_proj." in slot.path for slot in move.slots)


def _stored_name(name: str, adapted: set[str], has_lora: bool) -> str:
    """The package's name of a tensor, without wrappers that it omits."""
    if not has_lora:
        return wrapped_name(name)
    module, _, leaf = name.rpartition(".")
    inner = f"{module}.base_layer" if module in adapted else module
    return f"model.{wrapped_name(inner)}.{leaf}"
