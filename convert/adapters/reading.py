"""PEFT directories: LoRA adapters that `peft` reads and writes."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from convert.adapters.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    is_adapter,
    read_adapter_config,
)
from convert.adapters.places import PEFT_PREFIX, Place, places_of
from convert.errors import ConversionError, listing
from convert.families import Family
from convert.formats import SafetensorsFile
from convert.formats.wrapped_names import plain_names
from convert.loading import Variables, variables_of
from convert.plan import tensor_problems
from tptt_jax import CausalLM, LoraConfig, ModelConfig
from tptt_jax.processes import put
from tptt_jax.training.partition import load_trainable

_PICKLE = "adapter_model.bin"
# Some tools keep the adapter's name, which PEFT's save_pretrained removes.
_ADAPTER_NAME = re.compile(r"(?<=\.)(lora_[AB])\.default\.weight$")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An opened PEFT directory: everything but its weights has been read."""

    path: Path
    config: AdapterConfig
    file: SafetensorsFile
    stored_names: dict[str, str]
    """Name in the file, by name without the adapter's own ("default")."""


def open_adapter(directory: Path) -> Adapter:
    """Reads the settings of an adapter and the header of its weights.

    Args:
      directory: a PEFT directory.

    Returns:
      The opened adapter.

    Raises:
      ConversionError: if it cannot be read or has unsupported settings.
    """
    if not directory.is_dir() or not is_adapter(directory):
        raise ConversionError(
            f"{directory} has no {CONFIG_FILE}; give a directory that peft's save_pretrained wrote."
        )
    config = read_adapter_config(directory)
    weights = directory / WEIGHTS_FILE
    if not weights.is_file() and (directory / _PICKLE).is_file():
        raise ConversionError(
            f"{directory} has its weights only as a Python pickle ({_PICKLE}), which can run code "
            "when it is read. Convert it where you trust it: PeftModel.from_pretrained(BASE_MODEL, "
            "DIR).save_pretrained(OTHER_DIR) writes safetensors."
        )
    file = SafetensorsFile(weights)
    plain = plain_names(file.tensors, str(weights), PEFT_PREFIX)
    names = {own: _ADAPTER_NAME.sub(r"\1.weight", name) for name, own in plain.items()}
    counts = Counter(names.values())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConversionError(
            f"{weights} has {listing(twice)} twice, with and without .default: remove one."
        )
    stored = {canonical: name for name, canonical in names.items()}
    return Adapter(path=directory, config=config, file=file, stored_names=stored)


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """The report of `python -m convert inspect` for an adapter."""
    config, infos = adapter.config, adapter.file.tensors.values()
    return {
        "adapter": str(adapter.path),
        "format": "peft",
        "base": config.base,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "use_rslora": config.lora.use_rslora,
        "target_modules": config.target_modules,
        "parameters": sum(prod(info.shape) for info in infos),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype for info in infos)),
    }


@dataclass(frozen=True, kw_only=True)
class FittedAdapter:
    """An adapter whose tensors fit a model."""

    adapter: Adapter
    lora: LoraConfig
    """The adapters that the model must be built with."""
    places: Sequence[Place]
    """The places of its tensors."""
    projections: frozenset[str]
    """Every projection of the model that can be adapted, e.g. "self_attn.q_proj"."""

    def agreed(self, lora: LoraConfig | None) -> LoraConfig:
        """The adapter's own settings, or the user's equal ones; dropout may differ.

        Raises:
          ConversionError: if `lora` differs in rank, scale or projections.
        """
        if lora is None:
            return self.lora
        chosen = {path for path in self.projections if lora.matches(path)}
        same = chosen == {place.target for place in self.places}
        if same and (lora.rank, lora.scale) == (self.lora.rank, self.lora.scale):
            return lora
        own = self.lora
        raise ConversionError(
            f"the LoRA settings given differ from those of the adapter {self.adapter.path}; give "
            f"none, or --lora.rank {own.rank} --lora.alpha {own.alpha:g} "
            f"--lora.{'' if own.use_rslora else 'no-'}use-rslora "
            f"--lora.targets {' '.join(own.targets)}."
        )

    def load_into(self, model: CausalLM) -> None:
        """Loads the adapter's values into a model that was built with `lora`, in place.

        If only some layers are adapted, the others get a = b = 0. They add nothing, also after
        training, as both gradients are zero.

        Args:
          model: the model.

        Raises:
          ConversionError: if the adapter holds NaN or infinite values.
        """
        variables = variables_of(model)
        arrays = {
            name: variable.get_value()
            for name, (_, variable) in variables.items()
            if name.endswith((".lora.a", ".lora.b"))
        }
        values = {name: np.zeros(array.shape, array.dtype) for name, array in arrays.items()}
        invalid = []
        for place in self.places:
            for part, name in zip("ab", place.tensors, strict=True):
                stored = self.adapter.file.read(self.adapter.stored_names[name])
                # A value too large for float32 becomes Inf, which is reported below.
                with np.errstate(over="ignore"):
                    values[f"{place.path}.lora.{part}"][place.index] = stored.T
                if not np.isfinite(values[f"{place.path}.lora.{part}"][place.index]).all():
                    invalid.append(name)
        if invalid:
            raise ConversionError(
                f"{self.adapter.path} holds NaN or infinite values in {listing(invalid)}: "
                "fetch or train it again."
            )
        placed = {n: put(value, arrays[n].sharding) for n, value in values.items()}
        load_trainable(model, placed, None)


def fit_adapter(
    adapter: Adapter, config: ModelConfig, family: Family | None = None
) -> FittedAdapter:
    """Finds the place of every tensor of an adapter.

    Args:
      adapter: the opened adapter.
      config: of the base model.
      family: with the base model's module names, if they are not its own family's, as in a "titan"
        export.

    Returns:
      The adapter with its places.

    Raises:
      ConversionError: if it adapts none of the model's projections, or tensors are missing,
        unexpected or misshapen; the message names all of them.
    """
    variables = _fully_adapted(config)
    every = places_of(config, variables, family)
    places = [place for place in every if adapter.config.selects(place.module)]
    paths = dict.fromkeys(place.target for place in every)
    if not places:
        raise ConversionError(
            f"target_modules of {adapter.path} ({adapter.config.target_modules!s:.200}) selects "
            f"none of the projections of the base model ({', '.join(paths)}); check that both "
            "belong together."
        )
    rank = adapter.config.lora.rank
    expected: dict[str, tuple[int, ...]] = {}
    for place in places:
        inputs = variables[f"{place.path}.lora.a"][1].get_value().shape[-2]
        outputs = variables[f"{place.path}.lora.b"][1].get_value().shape[-1]
        expected |= zip(place.tensors, ((rank, inputs), (outputs, rank)), strict=True)
    found = {name: adapter.file.tensors[stored] for name, stored in adapter.stored_names.items()}
    if problems := tensor_problems(expected, found, lambda _: False):
        raise ConversionError(
            f"The tensors of {adapter.path} do not fit its {CONFIG_FILE} and the base model; check "
            f"that all belong together. {problems}."
        )
    lora = dataclasses.replace(adapter.config.lora, targets=_targets(places, paths))
    return FittedAdapter(adapter=adapter, lora=lora, places=places, projections=frozenset(paths))


def _fully_adapted(config: ModelConfig) -> Variables:
    """The variables of an abstract model with adapters on all projections."""
    lora = LoraConfig(rank=1, targets=(".*",))
    return variables_of(nnx.eval_shape(lambda: CausalLM(config, lora=lora, rngs=nnx.Rngs(0))))


def _targets(places: Iterable[Place], paths: Iterable[str]) -> tuple[str, ...]:
    """The adapted projections as targets of a LoraConfig: their last names where unique."""
    counts = Counter(_last_name(path) for path in paths)
    chosen = dict.fromkeys(place.target for place in places)
    return tuple(_last_name(path) if counts[_last_name(path)] == 1 else path for path in chosen)


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]
