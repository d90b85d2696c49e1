"""The stages before training on text: attention transfer and distillation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import TokenBatch, TokenBatchSource
from experiments.training.config import FitConfig
from experiments.training.metrics import StepRecord
from experiments.training.run import Run
from experiments.training.stage import Stage
from tptt_jax.training.fit import FitMetrics, make_fit_optimizer, make_fit_step
from tptt_jax.training.gate_fit import fit_gates
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import Partition, Trainable, load_trainable, split_trainable
from tptt_jax.training.train_step import (
    Batch,
    StepMetrics,
    TrainState,
    init_train_state,
    make_train_step,
)

_GATE_BATCHES = 2
# Both take about 15 minutes on two CPU cores for 135 million parameters (docs/memory.md).
_TRANSFER_STEPS = 30
_DISTILL_STEPS = 150


def fit_memory(run: Run) -> float:
    """Fits the memory of `run.model` to the base model; returns the seconds spent in steps."""
    fitting = Fitting.of(run)
    seconds, trainable = 0.0, fitting.initial
    transfer, distillation = fitting.transfer(), fitting.distillation()
    if not distillation.is_started:
        first = run.placement.place(fitting.start_transfer())
        state, seconds, _ = transfer.run(first, run.console)
        trainable = state.trainable
    if fitting.distill_steps:
        first = run.placement.place(fitting.start_distillation(trainable))
        state, more, _ = distillation.run(first, run.console)
        seconds, trainable = seconds + more, state.trainable
    load_trainable(run.model, trainable, None)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Fits the memory's parameters of a run's model to its base model."""

    run: Run
    rows: TokenBatchSource
    partition: Partition
    initial: Trainable
    """The memory's parameters before the fit."""

    @classmethod
    def of(cls, run: Run) -> "Fitting":
        """Collects the memory's parameters of a run's model, which has rows to fit on."""
        assert run.fit_rows is not None, "callers ask first"
        partition, trainable, _ = split_trainable(run.model, "memory")
        return cls(run=run, rows=run.fit_rows, partition=partition, initial=trainable)

    @property
    def config(self) -> FitConfig:
        """The options of the fit."""
        return self.run.config.fit

    @property
    def transfer_steps(self) -> int:
        """Steps of attention transfer."""
        return _TRANSFER_STEPS if self.config.steps is None else self.config.steps

    @property
    def distill_steps(self) -> int:
        """Steps of distillation."""
        chosen = self.config.distill_steps
        if chosen is not None:
            return chosen
        return _DISTILL_STEPS if self.config.steps is None else self.config.steps

    def transfer(self) -> Stage:
        """The stage that fits every layer's attention to the base model's."""
        optimizer = make_fit_optimizer(self.config.learning_rate, self.transfer_steps)
        step = make_fit_step(self.partition, optimizer)
        size = self.config.batch_size

        def run(state: TrainState, batch: Batch, window: Any) -> tuple[TrainState, FitMetrics]:
            return step(state, self.partition.frozen, batch.tokens, batch.segment_ids, window)

        return self._stage("transfer", "attention transfer", self.transfer_steps, size, run)

    def distillation(self) -> Stage:
        """The stage that fits the memory alone to the base model's predictions."""
        rate, steps = self.config.distill_learning_rate, self.distill_steps
        optimizer = make_optimizer(_distillation_optimizer(rate, steps), steps, self.partition)
        step = make_train_step(self.partition, optimizer, dropout=False, distill=1.0)

        def run(state: TrainState, batch: Batch, window: Any) -> tuple[TrainState, StepMetrics]:
            return step(state, self.partition.frozen, batch, window)

        size = self.config.distill_batch_size
        return self._stage("distill", "distillation", steps, size, run)

    def start_transfer(self) -> TrainState:
        """The state before attention transfer: gates and sizes in closed form.

        A memory that is fitted already keeps its own.
        """
        optimizer = make_fit_optimizer(self.config.learning_rate, self.transfer_steps)
        rows = [self._batch_at("gates", i, self.config.batch_size) for i in range(_GATE_BATCHES)]
        put = self.run.placement.put
        batches = [(put(batch).tokens, put(batch).segment_ids) for batch in rows]
        solved = fit_gates(self.partition, self.initial, self.partition.frozen, batches)
        trainable = _with_limits(self.initial, solved) if _is_fitted(self.initial) else solved
        return init_train_state(trainable, None, optimizer, jax.random.key(self.run.config.seed))

    def start_distillation(self, trainable: Trainable) -> TrainState:
        """The state before distillation."""
        rate, steps = self.config.distill_learning_rate, self.distill_steps
        optimizer = make_optimizer(_distillation_optimizer(rate, steps), steps, self.partition)
        return init_train_state(trainable, None, optimizer, jax.random.key(self.run.config.seed))

    def _stage(self, name: str, title: str, steps: int, size: int, step: Any) -> Stage:
        config, windows = self.run.config, self.run.windows

        def batch_at(number: int) -> tuple[tuple[Any, ...], int]:
            rows = self._batch_at(name, number, size)
            window = None
            if windows is not None:
                window = jnp.asarray(windows.draw(config.seed, name, number))
            # All processes read all rows here, and each counts a part of them.
            tokens = np.count_nonzero(rows.segment_ids) / jax.process_count()
            return (self.run.placement.put(rows), window), round(tokens)

        if name == "transfer":
            rate = ("--fit-learning-rate", "fit.learning_rate", self.config.learning_rate)
        else:
            now = self.config.distill_learning_rate
            rate = ("--distill-learning-rate", "fit.distill_learning_rate", now)
        return Stage(
            title=title,
            folder=config.output / name,
            steps=steps,
            checkpoint_every=config.checkpoints.checkpoint_every,
            keep_last=config.checkpoints.keep_last,
            step=step,
            batch_at=batch_at,
            rows_at=lambda number: self.rows.rows_at(number, size, self._seed_of(name)),
            rate=rate,
            name=name,
            trackers=self.run.trackers,
            finish_record=lambda state, record: self.run.with_memory(
                self.partition, state, record, is_last=record.step == steps
            ),
            to_record=_transfer_record if name == "transfer" else _distillation_record,
        )

    def _batch_at(self, name: str, number: int, size: int) -> TokenBatch:
        return self.rows.batch_at(number, size, self._seed_of(name))

    def _seed_of(self, name: str) -> int:
        """A separate seed, and thus order of rows, for each stage."""
        seed = self.run.config.seed
        return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])


def _is_fitted(trainable: Trainable) -> bool:
    """Whether any mass gate is fitted: before a fit their weights are zero."""
    weights = [value for name, value in trainable.items() if name.endswith(".mag.weight")]
    return any(bool(jnp.any(value != 0)) for value in weights)


def _with_limits(trainable: Trainable, solved: Trainable) -> Trainable:
    """Raises each mass gate's token limit to the larger of both fits."""
    limits = {
        name: jnp.maximum(value, solved[name])
        for name, value in trainable.items()
        if name.endswith(".mag.limit")
    }
    return trainable | limits


def _distillation_optimizer(rate: float, steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=rate, mag_learning_rate=rate, warmup_steps=min(10, steps // 5), beta2=0.95
    )


def _transfer_record(step: int, metrics: FitMetrics, seconds: float, tokens: int) -> StepRecord:
    gaps = [float(gap) for gap in np.asarray(metrics.gap_left)]
    return StepRecord(
        step=step,
        loss=float(np.mean(gaps)),
        tokens_per_s=tokens / seconds,
        seconds=seconds,
        gap_left=gaps,
    )


def _distillation_record(
    step: int, metrics: StepMetrics, seconds: float, tokens: int
) -> StepRecord:
    return StepRecord(
        step=step,
        loss=float(metrics.loss),
        tokens_per_s=tokens / seconds,
        grad_norm=float(metrics.grad_norm),
        seconds=seconds,
    )
