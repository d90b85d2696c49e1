"""A fine-tuning run: what its stages, its measurements and its reports share."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.data import StreamData, TokenBatchSource, TokenData
from experiments.training.best import has_stopped_early, records_until
from experiments.training.config import FinetuneConfig
from experiments.training.evaluation import HeldOut, evaluate_held_out
from experiments.training.metrics import StepRecord
from experiments.training.placement import Placement
from experiments.training.questions import Questions
from experiments.training.resume import Resumption
from experiments.training.run_data import TrainingBatches
from experiments.training.telemetry import Telemetry, begin_of
from experiments.training.trackers import Trackers
from experiments.training.windows import WindowRange
from tptt_jax import CausalLM
from tptt_jax.config import runs_memory
from tptt_jax.training.partition import Partition
from tptt_jax.training.train_step import TrainState

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

# Tokens of a row that is measured whole where a mesh divides rows.
_WHOLE_ROW = 4096


@dataclass(kw_only=True)
class Run:
    """A fine-tuning run, from `prepare_run`; `model` is the result of its latest stage."""

    config: FinetuneConfig
    console: Console
    tokenizer: "PreTrainedTokenizerFast"
    data: TokenData | StreamData
    fit_rows: TokenBatchSource | None
    """Rows to fit the memory on; None: no fit."""
    model: CausalLM
    mesh: "Mesh | None"
    resumption: Resumption
    trackers: Trackers = field(default_factory=Trackers)
    samples: dict[str, str] = field(default_factory=dict)
    """What `show_sample` has printed, by when."""

    @property
    def steps(self) -> int:
        """Steps of training on text."""
        return self.config.total_steps(self.data.train.num_rows)

    @property
    def was_complete(self) -> bool:
        """Whether earlier calls have done all steps, or have stopped early."""
        done = self.resumption.step
        return done is not None and (done >= self.steps or self.stopped_early)

    @functools.cached_property
    def stopped_early(self) -> bool:
        """Whether earlier calls have stopped early; metrics.jsonl is read once."""
        records = records_until(self.config.output, self.resumption.step)
        return has_stopped_early(records, self.config.held_out.early_stop)

    @property
    def window(self) -> int | None:
        """Tokens that softmax attention sees; None: all, or no softmax attention."""
        liza = self.model.liza
        return liza.softmax_window if liza is not None and liza.softmax else None

    @property
    def windows(self) -> WindowRange | None:
        """The windows that steps draw from; None: always the model's own."""
        liza = self.model.liza
        return WindowRange.checked(
            self.config.window_range, None if liza is None else liza.softmax_window
        )

    @property
    def has_memory(self) -> bool:
        """Whether the model has a memory that can be switched off."""
        liza = self.model.liza
        return liza is not None and liza.softmax and runs_memory(self.model.config, liza)

    @functools.cached_property
    def placement(self) -> Placement:
        """Where batches and states lie."""
        return Placement(mesh=self.mesh, rows_per_step=self.config.rows_per_step)

    @functools.cached_property
    def batches(self) -> TrainingBatches:
        """The batches of training on text."""
        asked_rows = self.config.asked_rows_per_step
        return TrainingBatches(
            source=self.data.train,
            asked=self.data.asked if isinstance(self.data, TokenData) else None,
            placement=self.placement,
            asked_placement=Placement(mesh=self.mesh, rows_per_step=asked_rows),
            model=self.model.config,
            tokenizer=self.tokenizer,
            windows=self.windows,
            seed=self.config.seed,
            output=self.config.output,
        )

    def held_out(self, model: CausalLM, *, use_memory: bool = True) -> HeldOut | None:
        """Losses on the held-out rows; None: there are none."""
        source = self.data.eval
        if source is None:
            return None
        long = source.sequence_length > self.config.data.sequence_length
        size = 1 if long else self.config.batch_size
        return evaluate_held_out(
            model, source, self.placement.put, batch_size=size, use_memory=use_memory
        )

    def questions(self) -> Questions | None:
        """Questions about text beyond the window; None without recall rows."""
        source, window = self.data.eval, self.window
        if not self.config.data.recall or source is None or window is None:
            return None
        return Questions(
            self.tokenizer,
            source.tokens[source.segment_ids != 0],
            length=self.config.data.recall_row_length,
            window=window,
            seed=self.resumption.record.seed,
        )

    def with_memory(
        self, partition: Partition, state: TrainState, record: StepRecord, *, is_last: bool
    ) -> StepRecord:
        """A step's record, now and then with what the memory of each layer does.

        Args:
          partition: of the model that the stage trains.
          state: after the step.
          record: of the step.
          is_last: whether it is the stage's last step.
        """
        if self._telemetry is None:
            return record
        return self._telemetry.add(
            record,
            lambda: partition.merge(state.trainable, state.share, partition.frozen),
            is_last=is_last,
        )

    @functools.cached_property
    def _telemetry(self) -> Telemetry | None:
        """None: no memory runs, or only a stream has rows."""
        if not runs_memory(self.model.config, self.model.liza):
            return None
        source = self.data.train if self.data.eval is None else self.data.eval
        if not isinstance(source, TokenBatchSource):
            return None
        first = source.batch_at(0, 1, self.config.seed)
        length = self.config.data.sequence_length
        if self.mesh is not None and self.mesh.shape["context"] > 1:
            # Every device reads the row whole.
            length = min(length, _WHOLE_ROW)
        row = self.placement.put(begin_of(first, length, self.window))
        every = self.config.checkpoints.checkpoint_every
        return Telemetry(row=row, every=every, console=self.console)
