"""Directories of the package tptt 0.12.1: LoRA adapters or weights around a base model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.adapters import Adapter, FittedAdapter, fit_adapter
from convert.adapters.config import WEIGHTS_FILE
from convert.adapters.places import PEFT_PREFIX
from convert.errors import ConversionError, listing
from convert.families import family_of
from convert.formats import SafetensorsFile
from convert.formats.wrapped_names import plain_names
from convert.loading import plan_for, variables_of
from convert.plan import tensor_problems
from convert.tptt.config import TpttConfig, plain_name, read_tptt_config
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.processes import put
from tptt_jax.training.partition import load_trainable

_LORA = (".lora_A.", ".lora_B.")
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class TpttCheckpoint:
    """An opened directory: everything but its weights has been read."""

    path: Path
    config: TpttConfig
    file: SafetensorsFile
    adapter: Adapter | None
    weights: dict[str, str]
    """Name in the file, by Hugging Face's name, of tensors of the base model itself."""


def open_tptt(directory: Path) -> TpttCheckpoint:
    """Reads the settings of a tptt directory and the header of its weights.

    Args:
      directory: the output of its save_pretrained.

    Returns:
      The opened directory.

    Raises:
      ConversionError: if it cannot be read or has unsupported settings.
    """
    config = read_tptt_config(directory)
    weights = directory / WEIGHTS_FILE
    pickles = [path.name for pattern in _PICKLES for path in directory.glob(pattern)]
    if not weights.is_file() and pickles:
        raise ConversionError(
            f"{directory} has its weights only as Python pickles ({listing(pickles)}), which can "
            "run code when they are read; save it again with tptt 0.12.1 where you trust it."
        )
    file = SafetensorsFile(weights)
    has_lora = config.adapter is not None
    stored = {
        own: _canonical(name, has_lora=has_lora)
        for name, own in plain_names(file.tensors, str(weights)).items()
    }
    counts = Counter(stored.values())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConversionError(f"{weights} has {listing(twice)} more than once: remove one.")
    lora, plain = (
        {name: key for key, name in stored.items() if is_lora == any(x in name for x in _LORA)}
        for is_lora in (True, False)
    )
    if config.adapter is None:
        # Without adapters, adapter tensors have no place and are reported as unexpected.
        return TpttCheckpoint(
            path=directory, config=config, file=file, adapter=None, weights=plain | lora
        )
    names = {f"{PEFT_PREFIX}{name}": key for name, key in lora.items()}
    adapter = Adapter(path=directory, config=config.adapter, file=file, stored_names=names)
    return TpttCheckpoint(path=directory, config=config, file=file, adapter=adapter, weights=plain)


def _canonical(name: str, *, has_lora: bool) -> str:
    """The name in the plain base model, or the name of an adapter on it."""
    name = name.removeprefix("tptt_model.").removeprefix("base_model.")
    if has_lora:
        # The wrapper of PEFT.
        name = name.removeprefix("model.").replace(".base_layer.", ".")
    for part in _LORA:
        name = name.replace(f"{part}default.", part)
    return plain_name(name)


def describe_tptt(checkpoint: TpttCheckpoint) -> dict[str, Any]:
    """The report of `python -m convert inspect`."""
    config = checkpoint.config
    infos = checkpoint.file.tensors.values()
    lora = None if config.adapter is None else config.adapter.lora
    return {
        "adapter": str(checkpoint.path),
        "format": "tptt",
        "base": config.base,
        "rank": None if lora is None else lora.rank,
        "alpha": None if lora is None else lora.alpha,
        "num_householder": config.liza.num_householder,
        "mag_weight": config.liza.mag_init,
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
    }


@dataclass(frozen=True, kw_only=True)
class FittedTptt:
    """A directory whose tensors fit a base model."""

    checkpoint: TpttCheckpoint
    adapter: FittedAdapter | None

    @property
    def liza(self) -> LizaConfig:
        """The memory of its training."""
        return self.checkpoint.config.liza

    def agreed(self, lora: LoraConfig | None) -> LoraConfig | None:
        """See `FittedAdapter.agreed`; any value is allowed if whole weights were trained."""
        return lora if self.adapter is None else self.adapter.agreed(lora)

    def load_into(self, model: CausalLM) -> None:
        """Loads the values into a model built with `liza` and the agreed adapters, in place.

        Raises:
          ConversionError: if they hold NaN or infinite values.
        """
        if self.adapter is not None:
            self.adapter.load_into(model)
        if self.checkpoint.weights:
            _load_weights(self.checkpoint, model)


def fit_tptt(checkpoint: TpttCheckpoint, config: ModelConfig) -> FittedTptt:
    """Finds the place of every tensor.

    Args:
      checkpoint: the opened directory.
      config: of the base model.

    Returns:
      The directory with its places.

    Raises:
      ConversionError: if tensors of adapters are missing, unexpected or misshapen.
    """
    adapter = None if checkpoint.adapter is None else fit_adapter(checkpoint.adapter, config)
    return FittedTptt(checkpoint=checkpoint, adapter=adapter)


def _load_weights(checkpoint: TpttCheckpoint, model: CausalLM) -> None:
    variables = variables_of(model)
    rules = family_of(model.config.family).rules(model.config)
    plan = plan_for(rules, model, variables)
    moves = [move for move in plan if checkpoint.weights.keys() & set(move.sources)]
    expected = {
        name: shape
        for move in moves
        for name, shape in zip(move.sources, move.source_shapes, strict=True)
    }
    tensors = checkpoint.file.tensors
    found = {name: tensors[stored] for name, stored in checkpoint.weights.items()}
    if problems := tensor_problems(expected, found, lambda _: False):
        raise ConversionError(
            f"The tensors of {checkpoint.path} do not fit the base model; check that both belong "
            f"together. {problems}."
        )
    values: dict[str, np.ndarray] = {}
    invalid: list[str] = []
    for move in moves:
        stored = [checkpoint.file.read(checkpoint.weights[name]) for name in move.sources]
        arrays = move.transform.forward(stored, [slot.shape for slot in move.slots])
        for slot, array in zip(move.slots, arrays, strict=True):
            if slot.path not in values:
                values[slot.path] = np.array(variables[slot.path][1].get_value())
            whole = values[slot.path]
            # Ellipsis: a view even if the part is a single number.
            place = (*slot.index, ...)
            # A value too large for float16 becomes Inf, which is reported below.
            with np.errstate(over="ignore"):
                whole[place] = array.astype(whole.dtype)
            if not np.isfinite(whole[place]).all():
                invalid.extend(move.sources)
    if invalid:
        raise ConversionError(
            f"{checkpoint.path} holds NaN or infinite values in {listing(invalid)}: fetch "
            "or train it again."
        )
    placed = {
        name: put(value, variables[name][1].get_value().sharding) for name, value in values.items()
    }
    load_trainable(model, placed, None)
