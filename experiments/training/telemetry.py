"""The memory of each layer during a run, and a warning before it blows up."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np
from rich.console import Console

from experiments.data import TokenBatch
from experiments.training.metrics import StepRecord
from tptt_jax import CausalLM
from tptt_jax.processes import fetch
from tptt_jax.sharding import off_mesh
from tptt_jax.training.memory_health import MemoryHealth, measure_memory, memory_layers
from tptt_jax.training.train_step import Batch

MAX_STATE_NORM = 100.0
"""Orthogonal keys leave a norm of 1. What is a hundred times that cancels in most reads, which
costs two of float32's seven digits, and all that bfloat16 has."""
MAX_CONDITION = 1e5
"""float32 rounds by 1.2e-7 of a number: a system of this condition is solved to 1%, and one of 8e6
not at all."""


@dataclass(kw_only=True)
class Telemetry:
    """Measures the memory on one row of text, now and then."""

    row: Batch
    """[1, T], on the devices."""
    every: int
    """Steps between measurements, besides those after which the held-out loss is measured."""
    console: Console
    _warned: set[str] = field(default_factory=set)

    def add(
        self, record: StepRecord, model: Callable[[], CausalLM], *, is_last: bool
    ) -> StepRecord:
        """A step's record with the memory's measures, if it is time for them.

        Args:
          record: of the step.
          model: gives the model after the step.
          is_last: whether it is the stage's last step.
        """
        if not is_last and record.eval_loss is None and record.step % self.every:
            return record
        after = model()
        layers = memory_layers(after)
        with off_mesh():
            measured = measure_memory(after, self.row.tokens, self.row.segment_ids)
        health = jax.tree.map(fetch, measured)
        for kind, line in find_dangers(health, layers).items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.console.print(f"warning: step {record.step}: {line}", markup=False)
        memory = {"layer": list(layers)}
        memory |= {name: list(map(_finite, x)) for name, x in health._asdict().items()}
        return dataclasses.replace(record, memory=memory)


def begin_of(row: TokenBatch, length: int, window: int | None) -> TokenBatch:
    """As many tokens of a row as training sees, but enough for the window to lose as many again.

    Args:
      row: [1, T].
      length: tokens of a row of training.
      window: of the model; None: there is none.
    """
    return TokenBatch(*(array[:, : max(length, 2 * (window or 0))] for array in row))


def find_dangers(health: MemoryHealth, layers: tuple[int, ...]) -> dict[str, str]:
    """What is about to blow up, a line for each kind of danger.

    Args:
      health: arrays [M].
      layers: the layers' numbers.
    """
    dangers = {}
    share, _, norms, conditions = map(np.asarray, health)
    bad = ~np.isfinite(share) | np.isposinf(norms)
    if bad.any():
        dangers["finite"] = (
            f"the memory of layer {layers[int(np.argmax(bad))]} is not finite: lower the learning "
            "rate, or start again from an earlier checkpoint"
        )
    worst, norm = _largest(norms)
    if MAX_STATE_NORM < norm < math.inf:
        dangers["state_norm"] = (
            f"the state of layer {layers[worst]} is {norm:.3g} times as large as orthogonal keys "
            f"make it; above {MAX_STATE_NORM:g} reads lose digits: lower the learning rate"
        )
    worst, condition = _largest(conditions)
    if condition > MAX_CONDITION:
        dangers["condition"] = (
            f"a chunk of layer {layers[worst]} has the condition number {condition:.3g}; above "
            f"{MAX_CONDITION:g} float32 is more than 1% off: lower the learning rate or "
            "--liza.chunk-size"
        )
    return dangers


def _largest(values: np.ndarray) -> tuple[int, float]:
    """Place and value of the largest number; NaN is passed over."""
    known = np.where(np.isnan(values), -np.inf, values)
    place = int(np.argmax(known))
    return place, float(known[place])


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
