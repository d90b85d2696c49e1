"""One stage of a run: a loop of compiled steps that can be interrupted, killed and resumed."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.process.interrupts import StopRequest, TerminationError
from experiments.training.event_files import EventFile
from experiments.training.metrics import MetricsWriter, NoMetrics, StepRecord
from experiments.training.prefetch import Prefetch
from experiments.training.report import TrainingProgress
from experiments.training.trackers import Tracker, Trackers, scalars
from tptt_jax.processes import (
    failing_together,
    is_first_process,
    raised_together,
    sums_of_all,
)
from tptt_jax.training.checkpoint import RunCheckpoints, latest_step
from tptt_jax.training.train_step import TrainState

STAGES = ("transfer", "distill", ".")
"""Folders of checkpoints in a run's directory."""

# This many skipped steps in a row are not one bad batch.
_MOST_SKIPPED = 10

Step = Callable[..., tuple[TrainState, Any]]
"""(state, *what `Stage.batch_at` gave) -> (state, metrics)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step function, its inputs, and the folder of its checkpoints."""

    title: str
    """Text before the step's number in messages."""
    folder: Path
    """Directory of `checkpoints`, `metrics.jsonl` and TensorBoard's event files."""
    steps: int
    """Total number of steps."""
    checkpoint_every: int
    """Steps between checkpoints; the last step always saves one."""
    step: Step
    batch_at: Callable[[int], tuple[tuple[Any, ...], int]]
    """Arguments of a step, by its number from 0, in transfer to the device; and their tokens (of
    several processes, each one's part). Called in a thread, ahead of the steps, in order."""
    to_record: Callable[[int, Any, float, int], StepRecord]
    """Steps done, metrics, seconds and tokens of the last one -> its record."""
    rows_at: Callable[[int], np.ndarray] = lambda number: np.zeros(0, np.int64)
    """Numbers of the rows in the batch of a step, by its number from 0."""
    rate: tuple[str, str, float] = ("--learning-rate", "learning_rate", 1e-3)
    """The flag of this stage's rate, its name for --resume-allow, and what it is now."""
    finish_record: Callable[[TrainState, StepRecord], StepRecord] = lambda state, record: record
    """Adds to a step's record what is measured now and then."""
    before_save: Callable[[int], None] = lambda step: None
    """Saves what belongs to a checkpoint, by its step."""
    is_over: Callable[[], bool] = lambda: False
    """Whether the stage ends after the steps that are done."""
    keep_last: int = 2
    """Checkpoints that stay; older ones are removed once a newer one is on disk."""
    sound_step: int | None = None
    """A step whose files this call has compared with what was written."""
    is_last: bool = False
    """Whether this is the last stage: Ctrl-C after its last step is not an interruption."""
    skips_non_finite: bool = False
    """Whether a step that is not finite is left out with a message, and not an error."""
    name: str = "train"
    """Put before the names of metrics for trackers."""
    trackers: Trackers = field(default_factory=Trackers)
    """Where metrics go besides."""

    @property
    def is_started(self) -> bool:
        """Whether an earlier call saved a checkpoint."""
        return self.is_started_in(self.folder)

    @staticmethod
    def is_started_in(folder: Path) -> bool:
        """Whether a stage in this folder saved a checkpoint."""
        return latest_step(folder) is not None

    def run(self, initial: TrainState, console: Console) -> tuple[TrainState, float, int]:
        """Runs to the last step, from the last checkpoint if there is one.

        Args:
          initial: the state before the first step.
          console: for progress.

        Returns:
          The last state, the seconds spent in steps now, and the steps of earlier calls.

        Raises:
          KeyboardInterrupt: after saving, if Ctrl-C requested a stop.
          TerminationError: likewise, if SIGTERM did.
          ValueError: if a step is not finite; the state before it is saved. With
            `skips_non_finite` only after ten such steps in succession.
          OSError: if a checkpoint cannot be written.
        """
        with RunCheckpoints(self.folder, keep=self.keep_last) as checkpoints:
            state = initial
            if checkpoints.latest_step is not None:
                state = checkpoints.restore(initial, sound=self.sound_step)
                done = int(state.step)
                if done < self.steps or (done == self.steps and not self.is_last):
                    console.print(f"{self.title}: resuming after {done} of {self.steps}")
            first = int(state.step)
            state, seconds = self._loop(state, checkpoints, console)
            return state, seconds, first

    def _loop(
        self, state: TrainState, checkpoints: RunCheckpoints, console: Console
    ) -> tuple[TrainState, float]:
        first, total, last, skipped = int(state.step), 0.0, False, 0
        if first >= self.steps or self.is_over():
            # A run without steps still leaves what later commands load.
            checkpoints.save(state)
            return state, total
        file = self.folder / "metrics.jsonl"
        writer = MetricsWriter(file, resume_step=first) if is_first_process() else NoMetrics()
        progress = TrainingProgress(self.steps, first_step=first, console=console, title=self.title)
        trackers: list[Tracker] = [self.trackers.of_stage(self.name, writer.logged)]
        prefetch = Prefetch(self.batch_at, first, self.steps)
        with StopRequest() as stop, writer, progress, prefetch, contextlib.ExitStack() as opened:
            if is_first_process():
                events = EventFile(self.folder, resume_step=first)
                trackers.append(opened.enter_context(contextlib.closing(events)))
            for number in range(first, self.steps):
                with failing_together():
                    (batch, tokens), waited = prefetch.get()
                start = time.perf_counter()
                state, metrics = self.step(state, *batch)
                jax.block_until_ready(metrics)
                seconds = waited + time.perf_counter() - start
                total += seconds
                (counted,) = map(int, sums_of_all([tokens]))
                record = self.to_record(number + 1, metrics, seconds, counted)
                record = dataclasses.replace(record, wait_seconds=waited)
                skipped = 0 if metrics.is_finite else skipped + 1
                if skipped >= (_MOST_SKIPPED if self.skips_non_finite else 1):
                    self._keep(state, checkpoints)
                    with failing_together():
                        raise self._not_finite(record, kept=int(state.step))
                if skipped:
                    # The state is the one before the step; the step still counts.
                    state = state._replace(step=state.step + 1)
                    progress.note(f"left out: {self._named(record)}")
                record = self.finish_record(state, record)
                writer.write(record)
                for each in trackers:
                    each.log(record.step, scalars(record))
                progress.update(record)
                last = number + 1 == self.steps or self.is_over()
                stopped, _ = _agreed(stop)
                if last or stopped or (number + 1) % self.checkpoint_every == 0:
                    self.before_save(number + 1)
                    checkpoints.save(state)
                checkpoints.check()
                if last or stopped:
                    break
        # Also a signal that came after the last step.
        stopped, terminated = _agreed(stop)
        done = int(state.step)
        if terminated or (stopped and not (last and self.is_last)):
            checkpoints.wait()
            raise raised_together(self._stopped(done, progress, is_termination=terminated))
        return state, total

    def _stopped(
        self, done: int, progress: TrainingProgress, *, is_termination: bool
    ) -> KeyboardInterrupt:
        """The exception that ends all processes after a signal to any of them."""
        if is_termination:
            return TerminationError(
                f"stopped after {self.title} {done} of {self.steps}, which is saved"
            )
        progress.note(f"stopped after step {done}: the same command resumes")
        return KeyboardInterrupt()

    def _keep(self, state: TrainState, checkpoints: RunCheckpoints) -> None:
        """Saves the state before a step that is not finite, if anything was trained."""
        if kept := int(state.step):
            self.before_save(kept)
            checkpoints.save(state)
            checkpoints.wait()

    def _not_finite(self, record: StepRecord, *, kept: int) -> ValueError:
        """The error of a step that is not finite, after step `kept`."""
        option, setting, rate = self.rate
        remedy = f"resume with {option} below {rate:g}"
        where = "nothing was trained yet"
        if kept:
            remedy += f" and --resume-allow {setting}"
            where = f"the state after step {kept} is kept in {self.folder}"
        if self.is_last and not self.skips_non_finite:
            remedy += ", or leave such steps out with --non-finite skip"
        return ValueError(f"{self._named(record)}: {remedy}; {where}.")

    def _named(self, record: StepRecord) -> str:
        """What a step that is not finite has read and given."""
        rows = ", ".join(map(str, self.rows_at(record.step - 1)))
        norm = "" if record.grad_norm is None else f", gradient norm {record.grad_norm:.4g}"
        return (
            f"{self.title} {record.step} is not finite (loss {record.loss:.4g}{norm}, packed rows "
            f"{rows})"
        )


def _agreed(stop: StopRequest) -> tuple[bool, bool]:
    """Whether a signal has requested a stop in any process, and whether SIGTERM did."""
    stopped, terminated = sums_of_all([stop.requested, stop.is_termination])
    return stopped > 0, terminated > 0
