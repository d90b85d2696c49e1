"""The last stage of a run: trains adapters or weights on text."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training.best import BestState
from experiments.training.checks import describe_run
from experiments.training.metrics import StepRecord
from experiments.training.run import Run
from experiments.training.stage import Stage
from tptt_jax.training.optimizer import make_optimizer
from tptt_jax.training.partition import Partition, split_trainable
from tptt_jax.training.train_step import (
    Batch,
    StepMetrics,
    TrainState,
    TrainStep,
    init_train_state,
    make_train_step,
)


def train_on_text(run: Run) -> tuple[TrainState, float, int]:
    """Trains a run's model on its text; `run.model` stays as it is.

    Returns:
      The last state, the seconds spent in steps, and the number of steps of earlier calls.
    """
    config = run.config
    partition, first, compiled = training_parts(run)
    count = sum(value.size for value in first.trainable.values())
    run.console.print(f"training {count:,} parameters ({config.train}) for {run.steps} steps")
    best = BestState(
        config.output,
        describe_run(config),
        run.resumption.step or 0,
        keep_best=config.held_out.keep_best,
        early_stop=config.held_out.early_stop,
    )

    def step(
        state: TrainState, batch: Batch, window: Any, asked: Batch | None
    ) -> tuple[TrainState, StepMetrics]:
        return compiled(state, partition.frozen, batch, window, asked)

    def finish(state: TrainState, record: StepRecord) -> StepRecord:
        if _is_evaluated(run, record.step):
            held_out = run.held_out(partition.merge(state.trainable, state.share, partition.frozen))
            loss = None if held_out is None else held_out.loss
            record = dataclasses.replace(record, eval_loss=loss)
        best.add(state, record)
        return run.with_memory(partition, state, record, is_last=record.step == run.steps)

    optimizer = config.optimizer.for_memory(config.liza)
    stage = Stage(
        title="step",
        rate=("--learning-rate", "learning_rate", config.optimizer.learning_rate),
        folder=config.output,
        steps=run.steps,
        checkpoint_every=config.checkpoints.checkpoint_every,
        keep_last=config.checkpoints.keep_last,
        step=step,
        batch_at=run.batches.batch_at,
        rows_at=run.batches.rows_at,
        to_record=functools.partial(_record, optimizer.schedule(run.steps)),
        finish_record=finish,
        is_over=best.is_over,
        before_save=run.batches.save_position,
        sound_step=run.resumption.step,
        skips_non_finite=config.non_finite == "skip",
        is_last=True,
        trackers=run.trackers,
    )
    last, seconds, earlier = stage.run(first, run.console)
    if best.step is not None and not run.was_complete:
        kept = "" if best.best_folder is None else f", kept in {best.best_folder}"
        early = " (stopped early)" if int(last.step) < run.steps else ""
        run.console.print(
            f"trained to step {int(last.step)}{early}; "
            f"the lowest held-out loss was at step {best.step}{kept}",
            markup=False,
        )
    return last, seconds, earlier


def training_parts(run: Run) -> tuple[Partition, TrainState, TrainStep]:
    """The model taken apart, the state before the first step of training, and that step."""
    config = run.config
    partition, trainable, share = split_trainable(run.model, config.train)
    optimizer = make_optimizer(config.optimizer.for_memory(config.liza), run.steps, partition)
    first = init_train_state(trainable, share, optimizer, jax.random.key(config.seed))
    step = make_train_step(
        partition,
        optimizer,
        mag_schedule=config.mag,
        remat=config.remat,
        distill=config.distill,
        accumulate=config.accumulate,
        asked_parts=config.asked_batches,
    )
    return partition, run.placement.place(first), step


def _is_evaluated(run: Run, step: int) -> bool:
    """Whether the held-out loss is measured after a step of training."""
    every = run.config.held_out.eval_every
    if not every:
        return False
    # The last step is measured in any case, once training is over.
    return step % every == 0 if step < run.steps else run.config.held_out.keep_best


def _record(rate: Any, step: int, metrics: StepMetrics, seconds: float, tokens: int) -> StepRecord:
    shares = (float(x) for x in (metrics.mu_mean, metrics.mu_min, metrics.mu_max))
    mean, least, most = (None if math.isnan(share) else share for share in shares)
    return StepRecord(
        step=step,
        loss=float(metrics.loss),
        tokens_per_s=tokens / seconds,
        learning_rate=float(jnp.asarray(rate(step - 1))),
        grad_norm=float(metrics.grad_norm),
        seconds=seconds,
        mu_mean=mean,
        mu_min=least,
        mu_max=most,
    )
