"""Keeps the weights with the lowest held-out loss, and ends training when it no longer falls."""

import math
from collections.abc import Sequence
from pathlib import Path

from experiments.training.metrics import StepRecord, folder_metrics
from tptt_jax.processes import is_first_process
from tptt_jax.training.checkpoint import (
    RunCheckpoints,
    latest_step,
    remove_checkpoints_after,
)
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.train_step import TrainState

BEST = "best"
"""Folder below a run's directory; it is loaded like a run."""


def has_stopped_early(records: Sequence[StepRecord], early_stop: int | None) -> bool:
    """Whether at least `early_stop` evaluations came after the best one.

    Args:
      records: of all steps so far.
      early_stop: evaluations; None: never.
    """
    best = _best_step(records)
    if early_stop is None or best is None:
        return False
    return (
        sum(record.eval_loss is not None for record in records if record.step > best) >= early_stop
    )


def _best_step(records: Sequence[StepRecord]) -> int | None:
    """The first step with the lowest held-out loss; None: none was evaluated."""
    losses = {record.step: record.eval_loss for record in records if record.eval_loss is not None}
    # NaN is never lowest.
    finite = {step: loss if math.isfinite(loss) else math.inf for step, loss in losses.items()}
    return min(finite, key=lambda step: finite[step], default=None)


def records_until(output: Path, step: int | None) -> list[StepRecord]:
    """The records of a run's steps up to `step`; none without a step."""
    return [record for record in folder_metrics(output) if record.step <= step] if step else []


class BestState:
    """Follows the held-out loss, and keeps the state where it is lowest."""

    def __init__(
        self,
        output: Path,
        description: Description,
        first_step: int,
        *,
        keep_best: bool,
        early_stop: int | None,
    ) -> None:
        """Reads the evaluations of the steps that earlier calls have done.

        Args:
          output: of the run.
          description: what loads a checkpoint.
          first_step: steps that are done.
          keep_best: whether the state is kept; otherwise only the losses are followed.
          early_stop: see `has_stopped_early`.
        """
        self._folder = output / BEST if keep_best else None
        self._description = description
        self._early_stop = early_stop
        self._records = records_until(output, first_step)
        if self._folder is not None and is_first_process():
            # The steps after the last checkpoint are run again.
            remove_checkpoints_after(self._folder, first_step)

    @property
    def step(self) -> int | None:
        """The step with the lowest held-out loss so far; None before the first evaluation."""
        return _best_step(self._records)

    @property
    def best_folder(self) -> Path | None:
        """The folder with that step's weights; None: they were not kept."""
        is_kept = self._folder is not None and latest_step(self._folder) == self.step is not None
        return self._folder if is_kept else None

    def add(self, state: TrainState, record: StepRecord) -> None:
        """Takes a step's record; one that was evaluated may be the best so far."""
        self._records.append(record)
        if self._folder is None or record.eval_loss is None or self.step != record.step:
            return
        if is_first_process():
            write_description(self._folder, self._description)
        # Save before the run continues: a resumed run does not measure this step again.
        with RunCheckpoints(self._folder, keep=1) as checkpoints:
            checkpoints.save(state)

    def is_over(self) -> bool:
        """Whether the run is to end here."""
        return has_stopped_early(self._records, self._early_stop)
