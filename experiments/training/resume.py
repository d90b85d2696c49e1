"""Resuming a run: which settings may differ, and what is recorded.

`run.json` in a run's directory holds fingerprints of the run's inputs, the seed that chose its
rows, and the changes that --resume-allow permitted.
"""

import dataclasses
import difflib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from convert.errors import ConversionError
from convert.formats.files import check_regular, read_json
from experiments.command_line import read_yaml, resolved_yaml
from experiments.data.data_files import find_data, find_parts
from experiments.models import is_tuned
from experiments.process.distributed import DistributedConfig
from experiments.training import fingerprints
from experiments.training.config import FinetuneConfig
from experiments.training.stage import STAGES
from tptt_jax import CausalLM
from tptt_jax.durable import atomic_file
from tptt_jax.training.base_weights import RECORD, hash_weights
from tptt_jax.training.checkpoint import latest_sound_step, latest_step
from tptt_jax.training.description import check_types

_FORMAT = "tptt_jax run 1"
# Not compared here: length, place and display. `checks.py` compares the model.
_FREE = (
    *("output", "steps", "epochs", "checkpoint_every", "eval_every", "sample_prompt", "revision"),
    *("early_stop", "keep_best", "keep_last", "dry_run"),
    *("sample_tokens", "resume", "resume_allow", "remat", "mesh", "trackers", "strict"),
    *("non_finite", "distributed", "hub"),
    *("model", "liza", "no_liza", "lora", "train", "dtype", "base_dtype"),
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


@dataclass(kw_only=True)
class Record:
    """The content of `run.json`."""

    seed: int
    """Seed that chose the held-out rows and the rows of questions; it never changes."""
    data: dict[str, Any] | None = None
    fit_data: dict[str, Any] | None = None
    rows: str | None = None
    fit_rows: str | None = None
    held_out: str | None = None
    base: dict[str, str] = dataclasses.field(default_factory=dict)
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, output: Path) -> Self | None:
        """Reads a directory's record; None: there is none, as in older runs.

        Raises:
          ValueError: if the file is damaged, or something else has its name.
        """
        file = output / RECORD
        if not file.exists():
            return None
        try:
            values = read_json(file)
        except ConversionError as error:
            raise ValueError(f"{error} Remove it to resume without comparison.") from None
        try:
            if values.pop("format") != _FORMAT:
                raise ValueError(f'its "format" is not {_FORMAT!r}')
            check_types(cls, values)
            record = cls(**values)
            record._check_descriptions()
            return record
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): remove it to resume without comparison."
            ) from None

    def _check_descriptions(self) -> None:
        """Raises an error if data or a change cannot be described."""
        for data in (self.data, self.fit_data):
            fingerprints.describe_data(data)
        self.notes()

    def notes(self) -> str:
        """The permitted changes as comments of config.yaml."""
        return "".join(
            f"# after step {each['step']}, by --resume-allow: {each['name']} "
            f"{each['before']} -> {each['now']}\n"
            for each in self.changes
        )

    def write(self, output: Path) -> None:
        """Writes `run.json`."""
        values = {"format": _FORMAT} | dataclasses.asdict(self)
        with atomic_file(output / RECORD) as path:
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


class Resumption:
    """Compares a call with earlier calls in its output directory."""

    def __init__(self, config: FinetuneConfig) -> None:
        """Reads the record, and compares the settings and the data files.

        Raises:
          ValueError: if one differs that --resume-allow does not name.
        """
        self._config = config
        output = config.output
        steps = [latest_step(output / name) for name in STAGES] if config.resume else []
        self.is_started = any(step is not None for step in steps)
        """Whether there is a checkpoint to resume from."""
        self.step = latest_sound_step(output) if self.is_started else None
        """Of training; None: it has not begun."""
        self._earlier = Record.read(output) if self.is_started else None
        _check_names(config)
        seed, saved = config.seed, _saved_settings(output) if self.is_started else {}
        if self.is_started:
            found = self._earlier.seed if self._earlier else saved.get("seed")
            seed = found if isinstance(found, int) else seed
        self.record = Record(seed=seed)
        """What is written down once the run may begin."""
        data = config.data
        self.files = find_parts(
            *(data.path, data.split, data.revision),
            separate=bool(data.weights),
            leave_out=output,
        )
        """The files of the training data."""
        self.fit_files = (
            None if config.fit.data is None else find_data(config.fit.data, leave_out=output)
        )
        """Those of --fit-data; None: there is none."""
        self.record.data = fingerprints.of_data(self.files)
        self.record.fit_data = fingerprints.of_data(self.fit_files)
        self._changes: list[Change] = []
        if self.is_started:
            self._refuse(_changed_settings(saved, config) + self._changed_files())

    def hash_base(self, model: CausalLM) -> None:
        """Records the loaded base model; all processes do it together.

        Args:
          model: the base model with a new memory and new adapters.
        """
        self.record.base = hash_weights(model, adapters=is_tuned(self._config.model))

    def check_loaded(self, data: Any, fit_rows: Any) -> None:
        """Compares the loaded data, and the model that `hash_base` has recorded.

        Args:
          data: `TokenData`.
          fit_rows: rows to fit the memory on; None: no fit.

        Raises:
          ValueError: if something differs that --resume-allow does not name.
        """
        record, earlier = self.record, self._earlier
        record.rows, record.held_out = map(fingerprints.of_rows, (data.train, data.eval))
        record.fit_rows = fingerprints.of_rows(fit_rows)
        if earlier is None:
            return
        # A resumed run after its fit has no such rows.
        record.fit_rows = record.fit_rows or earlier.fit_rows
        record.changes = list(earlier.changes)
        found = []
        differing = [name for name in record.base if record.base[name] != earlier.base.get(name)]
        if differing or earlier.base.keys() - record.base.keys():
            names = differing or sorted(earlier.base.keys() - record.base.keys())
            a, b = (str(each.get(names[0], "none"))[:60] for each in (earlier.base, record.base))
            what = f"{len(names)} tensors of {self._config.model} have changed, first {names[0]}"
            found.append(Change("base", a, b, f"restore the base model ({what})"))
        remedy = "restore the data, the tokenizer and the packages that the run began with"
        if record.held_out != earlier.held_out:
            a, b = _short(earlier.held_out), _short(record.held_out)
            what = (
                "the held-out rows differ, so earlier measurements are not comparable: add "
                f"held_out to --resume-allow to repeat them, or {remedy}"
            )
            found.append(Change("held_out", a, b, what))
        if not self._changes:
            for name, before, now in (
                ("data.path", earlier.rows, record.rows),
                ("fit.data", earlier.fit_rows, record.fit_rows),
            ):
                if before != now and before is not None:
                    found.append(Change(name, _short(before), _short(now), remedy))
        self._refuse(found)

    @property
    def remeasures(self) -> bool:
        """Whether earlier measurements no longer apply."""
        earlier = self._earlier
        return earlier is not None and earlier.held_out != self.record.held_out

    def write(self) -> None:
        """Writes the record, and config.yaml with the permitted changes."""
        output = self._config.output
        for change in self._changes:
            entry = {"step": self.step or 0, "name": change.name}
            self.record.changes.append(entry | {"before": change.before, "now": change.now})
        self._changes = []
        self.record.write(output)
        # Another call may have other processes.
        alone = DistributedConfig()
        # The file is for going on, also after --no-resume.
        settings = dataclasses.replace(
            self._config, config=None, resume=True, resume_allow=(), distributed=alone
        )
        with atomic_file(output / "config.yaml") as path:
            path.write_text(self.record.notes() + resolved_yaml(settings), encoding="utf-8")

    def _changed_files(self) -> list[Change]:
        earlier, found = self._earlier, []
        if earlier is None:
            return []
        for name, before, now, flag in (
            ("data.path", earlier.data, self.record.data, "--data"),
            ("fit.data", earlier.fit_data, self.record.fit_data, "--fit-data"),
        ):
            if not fingerprints.is_same_data(before, now):
                a, b = map(fingerprints.describe_data, (before, now))
                found.append(Change(name, a, b, f"restore the data of {flag}"))
        return found

    def _refuse(self, changes: list[Change]) -> None:
        allowed = {name.replace("-", "_") for name in self._config.resume_allow}
        refused = [c for c in changes if not {c.name, c.name.partition(".")[0]} & allowed]
        self._changes += [change for change in changes if change not in refused]
        if refused:
            names = [change.name for change in refused]
            note = ""
            earlier = self._earlier.held_out if self._earlier else None
            if earlier and "held_out" not in allowed and any(map(_may_move_held_out, names)):
                names.append("held_out")
                note = " (other rows would be held out)"
            remedies = ", ".join(dict.fromkeys(change.remedy for change in refused))
            raise ValueError(
                f"{'; '.join(map(str, refused))}: {remedies}, allow it with --resume-allow "
                f"{' '.join(dict.fromkeys(names))}{note}, or start in another --output."
            )


def _may_move_held_out(name: str) -> bool:
    return name.startswith("data.") and not name.startswith("data.recall")


def _check_names(config: FinetuneConfig) -> None:
    known = [name for name in flat_settings(config) if _is_compared(name)] + list(_OTHERS)
    for given in config.resume_allow:
        name = given.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}."
            raise ValueError(f"--resume-allow has no setting {given!r}: {remedy}")


def _saved_settings(output: Path) -> dict[str, Any]:
    file = output / "config.yaml"
    check_regular(file)
    if not file.is_file():
        return {}
    settings = read_yaml(file)
    if not settings:
        raise ValueError(f"{file} is empty: remove it to resume without comparison.")
    return _flat(settings)


def _changed_settings(saved: Mapping[str, Any], config: FinetuneConfig) -> list[Change]:
    asked = flat_settings(config)
    return [
        Change(name, str(saved[name]), str(now), restoring(name, saved[name]))
        for name, now in asked.items()
        if _is_compared(name) and name not in _DATA and name in saved and saved[name] != now
    ]


def _is_compared(name: str) -> bool:
    return name.partition(".")[0] not in _FREE


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


def flat_settings(config: FinetuneConfig) -> dict[str, Any]:
    """The settings by dotted name, as config.yaml has them."""
    return _flat(yaml.safe_load(resolved_yaml(config)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"path": "x"}} -> {"data.path": "x"}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"rows {digest[:8]}"
