"""Where the metrics of a run go: TensorBoard, trackio, Weights & Biases, or what a user passes."""

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from convert.formats.files import read_json
from experiments.training.metrics import StepRecord
from experiments.training.tracking_services import OPENERS, REMEDIES
from tptt_jax.durable import atomic_file
from tptt_jax.error_text import first_line

TrackerName = Literal["trackio", "wandb"]

_LOG = logging.getLogger("tptt_jax.trackers")
# In a run's directory: the name under which services know it.
_IDENTITY = "trackers.json"


class Tracker(Protocol):
    """Takes the metrics of a run; pass your own to `experiments.finetune.finetune`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step.

        Args:
          step: of the stage, from 1; each is logged once, in order, also by resumed runs.
          metrics: finite numbers by name. A slash follows the name of the stage: "train/loss",
            "transfer/gap_left", "distill/loss".
        """
        ...

    def close(self) -> None:
        """Ends the run; also after an error."""
        ...


@dataclasses.dataclass(frozen=True)
class Trackers:
    """The trackers of one run, beside TensorBoard's files in each stage's folder."""

    opened: Sequence[Tracker] = ()
    is_continued: bool = False
    """Whether they have the steps of earlier calls."""

    def of_stage(self, name: str, logged: int) -> Tracker:
        """Combines the trackers into one for a stage.

        Args:
          name: put before the names of metrics.
          logged: the last step that an earlier call has logged, even if its state was lost.
        """
        return _StageTracker(self.opened, name, logged if self.is_continued else 0)


class _StageTracker:
    def __init__(self, trackers: Sequence[Tracker], name: str, logged: int) -> None:
        self._trackers, self._name, self._logged = trackers, name, logged

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._logged:
            return
        named = {f"{self._name}/{name}": value for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.log(step, named)

    def close(self) -> None:
        """Does nothing: the run closes the trackers after its last stage."""


def scalars(record: StepRecord) -> dict[str, float]:
    """What a step's record says, as finite numbers by name; lists have an entry for each layer."""
    values: dict[str, Any] = dataclasses.asdict(record)
    del values["step"]
    gaps = values.pop("gap_left")
    memory = values.pop("memory")
    if gaps is not None:
        values["gap_left"] = values.pop("loss")
        values |= {f"gap_left/layer_{i:02}": gap for i, gap in enumerate(gaps)}
    if memory is not None:
        layers = memory.pop("layer")
        for name, found in memory.items():
            pairs = zip(layers, found, strict=True)
            values |= {f"memory_{name}/layer_{layer:02}": value for layer, value in pairs}
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no tracker's."""
    for name in names:
        if name not in OPENERS:
            raise ValueError(f"trackers must be some of {', '.join(OPENERS)}, got {name!r}.")


def import_trackers(names: Sequence[TrackerName]) -> dict[str, Any]:
    """Imports the packages of trackers.

    Raises:
      ValueError: if one is not installed.
    """
    found = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--trackers {name} needs the package {name} ({error}): pip install "
                f"'tptt-jax[{name}]', or leave it out."
            ) from None
    return found


@contextlib.contextmanager
def open_trackers(
    modules: Mapping[str, Any],
    own: Sequence[Tracker],
    output: Path,
    settings: Mapping[str, Any],
    *,
    is_continued: bool,
) -> Iterator[Trackers]:
    """Opens the trackers of a run, and closes all of them at the end of the block.

    Args:
      modules: from `import_trackers`.
      own: a user's.
      output: the run's directory, whose name is the run's.
      settings: of the run, to show.
      is_continued: whether the run resumes from a checkpoint.

    Raises:
      ValueError: if a service cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        for tracker in own:
            stack.callback(tracker.close)
        opened = list(own)
        if modules:
            identity = _identity(output, is_continued)
            for name, module in modules.items():
                tracker = _Service.open(name, module, output, identity, settings)
                stack.callback(tracker.close)
                opened.append(tracker)
        yield Trackers(opened, is_continued)


def _identity(output: Path, is_continued: bool) -> str:
    file = output / _IDENTITY
    if is_continued and file.exists():
        known = read_json(file).get("id")
        if isinstance(known, str):
            return known
    identity = secrets.token_hex(4)
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity


class _Service:
    """A tracker of a service; if it fails, the run continues without it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._failed = name, tracker, False

    @classmethod
    def open(cls, name: str, *arguments: Any) -> "_Service":
        try:
            return cls(name, OPENERS[name](*arguments))
        except Exception as error:
            raise ValueError(
                f"--trackers {name} cannot start ({first_line(error, 200)}): {REMEDIES[name]}, "
                "or leave it out; the same command resumes the run."
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(functools.partial(self._tracker.log, step, metrics))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            _LOG.warning(
                "%s gets no more metrics (%s); those of all steps are in metrics.jsonl",
                self._name,
                first_line(error, 200),
            )
