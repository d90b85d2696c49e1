"""metrics.jsonl: one line of JSON per training step."""

import dataclasses
import json
import math
import operator
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from convert.formats.files import check_regular
from tptt_jax.durable import atomic_file


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One training step in numbers."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean over the step's targets, in nats per token; in attention transfer the mean gap left."""
    tokens_per_s: float
    learning_rate: float | None = None
    grad_norm: float | None = None
    """Before clipping."""
    mu_mean: float | None = None
    """Share of the memory, over all layers and heads; None without a memory."""
    mu_min: float | None = None
    mu_max: float | None = None
    seconds: float
    """Wall time of this step."""
    wait_seconds: float | None = None
    """Part of it in which the step waited for its rows; None in older files."""
    eval_loss: float | None = None
    """Held-out loss after this step, where it was measured."""
    gap_left: list[float] | None = None
    """In attention transfer, for every layer with a memory: squared error of its output over that
    of its window alone."""
    memory: dict[str, list[Any]] | None = None
    """Where it was measured, for every layer whose memory runs: its number, "layer", and what
    `tptt_jax.training.memory_health.MemoryHealth` says; None for what is not finite."""


class MetricsWriter:
    """Appends one JSON line per step to a file, each step exactly once.

    A run that resumes from step s drops an earlier process's lines about later steps, and an
    incomplete last line. Numbers that are not finite become null.

    Attributes:
      logged: the last step that an earlier process has written, also one that is dropped; 0: none.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        """Opens `path`, and keeps the steps of an earlier run up to `resume_step`; 0: none.

        Raises:
          ValueError: if it is not a regular file, or holds other lines than these.
        """
        check_regular(path)
        self.logged = _last_step(path)
        earlier = read_metrics(path) if resume_step and path.exists() else []
        kept = [record for record in earlier if record.step <= resume_step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        """Appends a step; it is on disk when this returns."""
        self._stream.write(_line(record))
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        os.fsync(self._stream.fileno())
        self._stream.close()

    def __enter__(self) -> Self:
        """Does nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()


class NoMetrics(MetricsWriter):
    """Writes nothing, where another process does."""

    def __init__(self) -> None:
        """Opens nothing."""
        self.logged = 0

    def write(self, record: StepRecord) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _line(record: StepRecord) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(record).items()
    }
    for name in ("wait_seconds", "eval_loss", "gap_left", "memory"):
        if finite[name] is None:
            del finite[name]
    return json.dumps(finite) + "\n"


def _last_step(path: Path) -> int:
    """The last step in a file; 0 if it has none or is not a metrics file."""
    try:
        return max((record.step for record in read_metrics(path)), default=0)
    except (OSError, ValueError):
        return 0


def read_metrics(path: Path) -> list[StepRecord]:
    """The steps of a file by `MetricsWriter`; null becomes NaN, except in optional fields.

    Raises:
      ValueError: if a line other than an incomplete last one is damaged, or it is no regular file.
    """
    check_regular(path)
    optional = {f.name for f in dataclasses.fields(StepRecord) if f.default is None}
    # Bytes that are not UTF-8 are not JSON either, which the line's error says.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            values: dict[str, Any] = {
                name: math.nan if value is None and name not in optional else value
                for name, value in json.loads(line).items()
            }
            record = StepRecord(**values)
            steps.append(replace(record, step=operator.index(record.step), loss=record.loss + 0.0))
        except (json.JSONDecodeError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{path}, line {number}, holds no metrics of a step: remove the line or the file."
            ) from None
    return steps


def folder_metrics(folder: Path) -> list[StepRecord]:
    """The steps in a folder's metrics.jsonl; none if there is no such file.

    Raises:
      ValueError: as `read_metrics`.
    """
    file = folder / "metrics.jsonl"
    return read_metrics(file) if file.is_file() else []
