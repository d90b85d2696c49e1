"""``python -m experiments.bench saves``: what asynchronous checkpoints cost."""

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.model_work import TrainingSteps, TrainWork
from experiments.benchmarks.timing import Options, machine, write_result
from experiments.process.compilation_cache import prepare_process
from tptt_jax.training.checkpoint import RunCheckpoints


@dataclass(frozen=True, kw_only=True)
class SaveWork(TrainWork):
    """Training steps on random tokens, with a checkpoint after the first of them."""

    steps: int = 20
    """Steps between checkpoints, as --checkpoint-every of finetune."""
    repeats: int = 5
    """Pairs of `steps` steps with a checkpoint and without."""


def bench_saves(
    work: Options[SaveWork], folder: Path | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Times training steps with one asynchronous checkpoint, in turn with steps without any.

    A checkpoint has the trained parameters and the optimizer's state, as in a run. The wait for
    the end of its write counts.

    Args:
      work: the steps.
      folder: directory of the checkpoints, on the disk to be measured, which are removed at the
        end; None: the temporary directory.
      output: JSON file for the result.

    Returns:
      `with_save_s` and `without_s`, medians; `overhead`, the median over pairs of the time with a
      checkpoint over the time without, minus 1; `copy_s`, the median time for which `save` itself
      stops the steps; `write_s`, the median until it is on disk; `checkpoint_bytes`.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--folder {folder} is no directory: name one on the disk to be measured.")
    prepare_process()
    steps = TrainingSteps(work, work.memory(work.window))
    steps.run()
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="saves-") as place,
        RunCheckpoints(place) as checkpoints,
    ):
        pairs = [_pair(steps, work.steps, checkpoints) for _ in range(work.repeats)]
    with_save, without, copies, writes = zip(*pairs, strict=True)
    state = (steps.state.trainable, steps.state.opt_state)
    result = {
        "bench": "saves",
        **machine(),
        "workload": dataclasses.asdict(work),
        "with_save_s": statistics.median(with_save),
        "without_s": statistics.median(without),
        "overhead": statistics.median(a / b for a, b, *_ in pairs) - 1,
        "copy_s": statistics.median(copies),
        "write_s": statistics.median(writes),
        "checkpoint_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    }
    if output is not None:
        write_result(output, result)
    return result


def _pair(
    steps: TrainingSteps, count: int, checkpoints: RunCheckpoints
) -> tuple[float, float, float, float]:
    """Seconds of `count` steps with a checkpoint, of as many without, of the copy and the write."""
    start = time.perf_counter()
    checkpoints.save(steps.state)
    copied = time.perf_counter() - start
    for _ in range(count):
        steps.run()
    checkpoints.wait()
    saved = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(count):
        steps.run()
    without = time.perf_counter() - start
    start = time.perf_counter()
    checkpoints.save(steps.state)
    checkpoints.wait()
    return saved, without, copied, time.perf_counter() - start
