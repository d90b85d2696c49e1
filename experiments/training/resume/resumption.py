"""What may differ from the earlier calls of a run, and what is written down."""

import dataclasses

from experiments.command_line import resolved_yaml
from experiments.data import StreamData, TokenBatchSource, TokenData
from experiments.data.data_files import find_data, find_parts
from experiments.models import is_tuned
from experiments.process.distributed import DistributedConfig
from experiments.training.config import FinetuneConfig
from experiments.training.resume import fingerprints
from experiments.training.resume.record import Record
from experiments.training.resume.settings import (
    Change,
    changed_settings,
    check_allowed,
    flat_settings,
    saved_settings,
)
from experiments.training.stage import STAGES
from tptt_jax import CausalLM
from tptt_jax.durable import atomic_file
from tptt_jax.training.base_weights import hash_weights
from tptt_jax.training.checkpoint import latest_sound_step, latest_step

_RESTORE = "restore the data, the tokenizer and the packages that the run began with"


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
        asked = flat_settings(config)
        check_allowed(config.resume_allow, asked)
        seed, saved = config.seed, saved_settings(output) if self.is_started else {}
        if self.is_started:
            found = self._earlier.seed if self._earlier else saved.get("seed")
            seed = found if isinstance(found, int) else seed
        self.record = Record(seed=seed)
        """What is written down once the run may begin."""
        data = config.data
        self.files = find_parts(
            data.path,
            data.split,
            data.revision,
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
            self._refuse(changed_settings(saved, asked) + self._changed_files())

    def hash_base(self, model: CausalLM) -> None:
        """Records the loaded base model; all processes do it together.

        Args:
          model: the base model with a new memory and new adapters.
        """
        self.record.base = hash_weights(model, adapters=is_tuned(self._config.model))

    def check_loaded(self, data: TokenData | StreamData, fit_rows: TokenBatchSource | None) -> None:
        """Compares the loaded data, and the model that `hash_base` has recorded.

        Args:
          data: of the run.
          fit_rows: rows to fit the memory on; None: no fit.

        Raises:
          ValueError: if something differs that --resume-allow does not name.
        """
        record, earlier = self.record, self._earlier
        asked = data.asked if isinstance(data, TokenData) else None
        record.rows = fingerprints.of_rows(data.train, asked)
        record.held_out = fingerprints.of_rows(data.eval)
        record.fit_rows = fingerprints.of_rows(fit_rows)
        if earlier is None:
            return
        # A resumed run after its fit has no such rows.
        record.fit_rows = record.fit_rows or earlier.fit_rows
        record.changes = list(earlier.changes)
        self._refuse(self._changed_base(earlier) + self._changed_rows(earlier))

    @property
    def needs_remeasuring(self) -> bool:
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

    def _changed_base(self, earlier: Record) -> list[Change]:
        before, now = earlier.base, self.record.base
        names = [name for name in now if now[name] != before.get(name)]
        names = names or sorted(before.keys() - now.keys())
        if not names:
            return []
        a, b = (str(each.get(names[0], "none"))[:60] for each in (before, now))
        what = f"{len(names)} tensors of {self._config.model} have changed, first {names[0]}"
        return [Change("base", a, b, f"restore the base model ({what})")]

    def _changed_rows(self, earlier: Record) -> list[Change]:
        record, found = self.record, []
        if record.held_out != earlier.held_out:
            what = (
                "the held-out rows differ, so earlier measurements are not comparable: add "
                f"held_out to --resume-allow to repeat them, or {_RESTORE}"
            )
            a, b = _short(earlier.held_out), _short(record.held_out)
            found.append(Change("held_out", a, b, what))
        if self._changes:
            return found
        for name, before, now in (
            ("data.path", earlier.rows, record.rows),
            ("fit.data", earlier.fit_rows, record.fit_rows),
        ):
            if before != now and before is not None:
                found.append(Change(name, _short(before), _short(now), _RESTORE))
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


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"rows {digest[:8]}"
