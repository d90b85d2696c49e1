"""run.json of a run: fingerprints of its inputs, the seed of its rows, and permitted changes."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from convert.errors import ConversionError
from convert.formats.files import read_json
from experiments.training.resume import fingerprints
from tptt_jax.durable import atomic_file
from tptt_jax.training.base_weights import RECORD
from tptt_jax.training.description import check_types

_FORMAT = "tptt_jax run 1"


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
