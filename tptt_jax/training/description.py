"""`checkpoint.json` of a run's directory: the source of the base model and its settings."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tptt_jax.config import LizaConfig, LoraConfig
from tptt_jax.durable import atomic_file
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.training.partition import TrainMode

DESCRIPTION = "checkpoint.json"
_FORMAT = "tptt_jax checkpoint 2"
# Older descriptions have no choice of writes: their memory holds every token.
_FIRST_FORMAT = "tptt_jax checkpoint 1"


@dataclass(frozen=True, kw_only=True)
class Description:
    """The description of a checkpoint, beside its arrays."""

    source: str
    """Source of the base model, as given to `load_pretrained`."""
    liza: LizaConfig | None
    lora: LoraConfig | None
    train: TrainMode
    dtype: str = "float32"
    base_dtype: BaseDtype | None = None
    """Of quantised base weights; None: `dtype`."""

    def to_json(self) -> str:
        """One indented JSON object."""
        values = dataclasses.asdict(self)
        return json.dumps({"format": _FORMAT} | values, indent=2) + "\n"


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a run's directory with a description in it."""
    return (Path(path) / DESCRIPTION).is_file()


def write_description(path: str | os.PathLike[str], description: Description) -> None:
    """Writes `checkpoint.json` into the directory, which is created if missing."""
    target = Path(path) / DESCRIPTION
    with atomic_file(target) as temporary:
        temporary.write_text(description.to_json())


def read_description(path: str | os.PathLike[str]) -> Description:
    """Reads `checkpoint.json`.

    Raises:
      ValueError: if there is none, or it is not one of ours.
    """
    target = Path(path) / DESCRIPTION
    if not target.is_file():
        raise ValueError(
            f"{path} has no {DESCRIPTION}: point to the --output directory of a finetune run."
        )
    try:
        values = _parse(target.read_text(encoding="utf-8"))
        version = values.pop("format", None)
        if version not in (_FORMAT, _FIRST_FORMAT):
            raise ValueError(f'its "format" is not {_FORMAT!r}')
        if version == _FIRST_FORMAT and values["liza"] is not None:
            values["liza"] = {"writes": "all"} | values["liza"]
        for name, kind in (("liza", LizaConfig), ("lora", LoraConfig)):
            if values[name] is not None:
                check_types(kind, values[name])
                values[name] = kind(**values[name])
        check_types(Description, values)
        return Description(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{target} is not the description of a checkpoint ({error}): point to the "
            "--output directory of a finetune run."
        ) from None


def _parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"it must hold a JSON object, it holds a {type(values).__name__}")
    return values


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raises ValueError if a JSON value has another type than a dataclass declares.

    Args:
      kind: the dataclass.
      values: by field; missing ones are not checked, nor what dicts and lists hold.
    """
    for name, hint in get_type_hints(kind).items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(f"{name} cannot be {values[name]!r:.100}")


def _fits(value: Any, hint: Any) -> bool:
    kind, options = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value is not True and value == option for option in options)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, options[0]) for each in value)
    if kind in (dict, list):
        return isinstance(value, kind)
    if options:
        return any(_fits(value, each) for each in options)
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
