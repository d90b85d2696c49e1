"""A process that is killed repeatedly during saves gives the result of an undisturbed one."""

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments.training.metrics import StepRecord, read_metrics
from experiments.training.stage import Stage
from tptt_jax.training.checkpoint import latest_step
from tptt_jax.training.train_step import TrainState, init_train_state

STEPS = 12
KILLS = 3
CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.experiments.test_kills import run_stage
run_stage(Path(sys.argv[1]))
"""


class Metrics(NamedTuple):
    loss: Any
    is_finite: Any = True


def to_record(step: int, metrics: Metrics, seconds: float, tokens: int) -> StepRecord:
    """What such a stage writes down of a step."""
    return StepRecord(step=step, loss=float(metrics.loss), tokens_per_s=1.0, seconds=seconds)


def run_stage(folder: Path) -> TrainState:
    """Trains a few numbers, with a checkpoint after every step."""
    optimizer = optax.adam(1e-2)

    def loss_of(trainable: Any, x: Any) -> Any:
        return jnp.mean((trainable["w"] * x - jnp.sin(x)) ** 2)

    @jax.jit
    def step(state: TrainState, x: Any) -> tuple[TrainState, Metrics]:
        loss, gradient = jax.value_and_grad(loss_of)(state.trainable, x)
        updates, opt_state = optimizer.update(gradient, state.opt_state)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        new = state._replace(trainable=trainable, opt_state=opt_state, step=state.step + 1)
        return new, Metrics(loss)

    stage = Stage(
        title="step",
        folder=folder,
        steps=STEPS,
        checkpoint_every=1,
        step=step,
        batch_at=lambda number: ((jnp.linspace(0, number + 1, 4096),), 1),
        to_record=to_record,
        is_last=True,
    )
    first = init_train_state({"w": jnp.ones(4096)}, None, optimizer, jax.random.key(0))
    return stage.run(first, Console(file=io.StringIO()))[0]


def test_kills_during_saves_lose_nothing(tmp_path, project_dir):
    whole = run_stage(tmp_path / "whole")
    folder, moments = tmp_path / "killed", np.random.default_rng()
    command = [sys.executable, "-c", CHILD, str(folder), str(project_dir)]
    for _ in range(KILLS):
        before = latest_step(folder) or 0
        with subprocess.Popen(command) as process:
            while process.poll() is None and (latest_step(folder) or 0) <= before:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
    assert latest_step(folder)
    resumed = run_stage(folder)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    records, expected = (read_metrics(f / "metrics.jsonl") for f in (folder, tmp_path / "whole"))
    assert [(each.step, each.loss) for each in records] == [
        (each.step, each.loss) for each in expected
    ]
    assert sorted(each.name for each in (folder / "checkpoints").iterdir()) == [
        str(STEPS - 1),
        str(STEPS),
    ]
