"""The settings of a run by their names: as flags, as config.yaml has them, and what has changed."""

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from convert.formats.files import check_regular
from experiments.command_line import read_yaml, resolved_yaml
from experiments.training.config import FinetuneConfig

Settings = Mapping[str, Any]
"""Values by dotted name: {"data.path": "x"}."""

# Not compared here: length, place and display. `checks.py` compares the model.
_FREE = (
    *("output", "steps", "epochs", "checkpoint_every", "eval_every", "sample_prompt", "revision"),
    *("early_stop", "keep_best", "keep_last", "dry_run"),
    *("sample_tokens", "resume", "resume_allow", "remat", "mesh", "trackers", "strict"),
    *("mesh_rules", "non_finite", "distributed", "hub"),
    *("horizon_auto", "model", "liza", "no_liza", "lora", "train", "dtype", "base_dtype"),
)
# Compared by content, not by name.
_DATA = ("data.path", "fit.data")
_OTHERS = ("data", "fit", "base", "held_out")


@dataclass(frozen=True)
class Change:
    """A setting that differs from earlier calls."""

    name: str
    before: str
    now: str
    remedy: str
    """How to restore the earlier value."""

    def __str__(self) -> str:
        """One part of a sentence."""
        return f"{self.name}: {self.before} in the run, {self.now} now"


def flat_settings(config: FinetuneConfig) -> Settings:
    """The settings by dotted name, as config.yaml has them."""
    return _flat(yaml.safe_load(resolved_yaml(config)))


def saved_settings(output: Path) -> Settings:
    """The settings in a run's config.yaml; none without that file.

    Raises:
      ValueError: if the file cannot be read or is empty.
    """
    file = output / "config.yaml"
    check_regular(file)
    if not file.is_file():
        return {}
    settings = read_yaml(file)
    if not settings:
        raise ValueError(f"{file} is empty: remove it to resume without comparison.")
    return _flat(settings)


def is_compared(name: str) -> bool:
    """Whether a resumed run may not differ in a setting without permission."""
    return name.partition(".")[0] not in _FREE


def changed_settings(saved: Settings, asked: Settings) -> list[Change]:
    """The settings that differ, but for those that are compared otherwise or not at all."""
    return [
        Change(name, str(saved[name]), str(now), restoring(name, saved[name]))
        for name, now in asked.items()
        if is_compared(name) and name not in _DATA and name in saved and saved[name] != now
    ]


def check_allowed(names: Sequence[str], settings: Settings) -> None:
    """Raises ValueError if --resume-allow names what is not compared.

    Args:
      names: given with --resume-allow, with "-" or "_".
      settings: of the run.
    """
    known = [name for name in settings if is_compared(name)] + list(_OTHERS)
    for given in names:
        name = given.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}."
            raise ValueError(f"--resume-allow has no setting {given!r}: {remedy}")


def flag_of(name: str) -> str:
    """The flag of a setting by its dotted name: "fit.length" -> "--fit-length"."""
    if name == "data.path":
        return "--data"
    block, _, rest = name.rpartition(".")
    if block == "fit":
        name = rest if rest.startswith("distill") else f"fit-{rest}"
    return f"--{name.replace('_', '-')}"


def restoring(name: str, value: Any) -> str:
    """The instruction that gives a setting this value again."""
    given = flag_with_value(name, value)
    return f"leave {flag_of(name)} out" if given is None else f"give {given}"


def flag_with_value(name: str, value: Any) -> str | None:
    """A setting as a flag for the shell: ("data.packing", False) -> "--data.no-packing".

    Args:
      name: dotted.
      value: from YAML; a list becomes several words.

    Returns:
      The flag; None for an empty list, which no flag can express.
    """
    flag = flag_of(name)
    if value is False:
        block, dot, last = flag.removeprefix("--").rpartition(".")
        return f"--{block}{dot}no-{last}"
    if value is True:
        return flag
    words = value if isinstance(value, list) else [value]
    return " ".join([flag, *(shlex.quote(str(word)) for word in words)]) if words else None


def _flat(values: Settings, prefix: str = "") -> dict[str, Any]:
    """{"data": {"path": "x"}} -> {"data.path": "x"}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
