"""``python -m experiments.bench train`` and ``decode``: a training step, and greedy decoding."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.flops import decoding_flops, training_flops
from experiments.benchmarks.random_models import ModelChoice
from experiments.benchmarks.timing import Job, Options, Timing, measure
from tptt_jax import LizaConfig, LoraConfig, generate
from tptt_jax.config import Remat
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import TrainMode, split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

_PROMPT = np.arange(10, 16)


@dataclass(frozen=True, kw_only=True)
class TrainWork(ModelChoice):
    """A training step on random tokens."""

    batch: int = 2
    """Rows."""
    tokens: int = 256
    """Per row."""
    window: int | None = 64
    """Tokens that softmax attention sees; None: all, and a memory of evicted tokens is idle."""
    train: TrainMode = "lora"
    """"lora": adapters of rank 8 on q, k, v and o; "projections": these weights; "full": all;
    "memory": the memory alone."""
    remat: Remat = "none"
    """What the backward pass recomputes. "none": only cheap intermediates; "dots": everything but
    products with weights; "full": whole layers."""


@dataclass(frozen=True, kw_only=True)
class DecodeWork(ModelChoice):
    """Greedy decoding after a short prompt."""

    batch: int = 1
    """Rows."""
    tokens: int = 128
    """New tokens of each row."""
    window: int | None = 64
    """Tokens that softmax attention sees; None: all, and a memory of evicted tokens is idle."""


def bench_train(work: Options[TrainWork], timing: Options[Timing]) -> dict[str, Any]:
    """Times one training step (AdamW, no dropout) on random tokens.

    With a memory behind a window, the same step with the window alone is timed alternately.
    """
    return measure("train", work, _training, timing)


def bench_decode(work: Options[DecodeWork], timing: Options[Timing]) -> dict[str, Any]:
    """Times greedy decoding after a short prompt, the prefill included.

    With a memory behind a window, the same with the window alone is timed alternately.
    """
    return measure("decode", work, _decoding, timing)


def _training(work: TrainWork) -> Job:
    liza = work.memory(work.window)
    if work.train == "memory":
        # A window alone has no parameters to train.
        return _training_job(work, liza)
    return _with_control(liza, lambda liza: _training_job(work, liza))


def _training_job(work: TrainWork, liza: LizaConfig | None) -> Job:
    steps = TrainingSteps(work, liza)
    model = steps.model
    flops = training_flops(
        model.config,
        model.liza,
        model.lora,
        batch=work.batch,
        tokens=work.tokens,
        mode=work.train,
    )
    return Job(steps.run, work.batch * work.tokens, flops)


class TrainingSteps:
    """A model in training, always on the same random tokens.

    Attributes:
      model: with its adapters.
      state: after the steps so far.
    """

    def __init__(self, work: TrainWork, liza: LizaConfig | None) -> None:
        """Loads the model with this memory, and compiles nothing yet."""
        lora = LoraConfig(dropout=0.0) if work.train == "lora" else None
        self.model = work.load(liza, lora)
        partition, trainable, share = split_trainable(self.model, work.train)
        optimizer = make_optimizer(OptimizerConfig(lr_schedule="constant"), 100, partition)
        self._step = make_train_step(partition, optimizer, remat=work.remat)
        self._frozen = partition.frozen
        rows = np.random.default_rng(0).integers(10, 5000, (work.batch, work.tokens))
        rows = jnp.asarray(rows % self.model.config.vocab_size)
        self._data = Batch(rows, jnp.ones_like(rows), jnp.ones(rows.shape, bool))
        self.state = init_train_state(trainable, share, optimizer, jax.random.key(0))

    def run(self) -> None:
        """One step; returns when it is done."""
        self.state, metrics = self._step(self.state, self._frozen, self._data)
        jax.block_until_ready(metrics)


def _decoding(work: DecodeWork) -> Job:
    liza = work.memory(work.window)
    return _with_control(liza, lambda liza: _decoding_job(work, liza))


def _decoding_job(work: DecodeWork, liza: LizaConfig | None) -> Job:
    model = work.load(liza)
    prompt = np.tile(_PROMPT % model.config.vocab_size, (work.batch, 1))
    flops = decoding_flops(
        model.config, model.liza, batch=work.batch, prompt=prompt.shape[1], tokens=work.tokens
    )
    return Job(
        lambda: np.asarray(generate(model, prompt, work.tokens, stop_tokens=()).tokens),
        work.batch * work.tokens,
        flops,
    )


def _with_control(liza: LizaConfig | None, make: Callable[[LizaConfig | None], Job]) -> Job:
    """Builds a job; a memory behind a window gets the window alone as its control."""
    job = make(liza)
    if liza is None or liza.writes != "evicted" or liza.softmax_window is None:
        return job
    alone = dataclasses.replace(liza, writes="none")
    return job._replace(control=make(alone).run)
