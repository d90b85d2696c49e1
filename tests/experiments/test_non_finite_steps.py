"""Steps that are not finite: left out when asked, and named."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments.training import FinetuneConfig
from experiments.training.metrics import read_metrics
from experiments.training.stage import Stage
from tests.experiments.test_kills import Metrics, to_record
from tptt_jax.training.checkpoint import latest_step
from tptt_jax.training.finite import keep_finite
from tptt_jax.training.train_step import TrainState, init_train_state

STEPS = 14


def run_stage(folder, broken, *, steps=STEPS, skips=True) -> tuple[TrainState, str]:
    """Adds each step's input to a number; the inputs of `broken` are NaN."""
    optimizer, out = optax.sgd(1.0), io.StringIO()

    def step(state: TrainState, x: Any) -> tuple[TrainState, Metrics]:
        new = ({"w": state.trainable["w"] + x}, state.step + 1)
        (trainable, count), is_finite = keep_finite((state.trainable, state.step), new, x)
        return state._replace(trainable=trainable, step=count), Metrics(x, is_finite)

    stage = Stage(
        title="step",
        folder=folder,
        steps=steps,
        checkpoint_every=3,
        step=step,
        batch_at=lambda number: ((jnp.asarray(jnp.nan if number in broken else number + 1.0),), 1),
        rows_at=lambda number: np.array([7, number]),
        to_record=to_record,
        skips_non_finite=skips,
        is_last=True,
    )
    first = init_train_state({"w": jnp.zeros(())}, None, optimizer, jax.random.key(0))
    return stage.run(first, Console(file=out, width=200))[0], out.getvalue()


def test_skipped_steps_are_named_and_count(tmp_path):
    state, told = run_stage(tmp_path, {1, 2, 8})
    assert float(state.trainable["w"]) == sum(range(1, STEPS + 1)) - (2 + 3 + 9)
    assert int(state.step) == STEPS == latest_step(tmp_path)
    assert "left out: step 9 is not finite (loss nan, packed rows 7, 8)" in told
    assert told.count("left out") == 3
    losses = [record.loss for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [i for i, loss in enumerate(losses) if np.isnan(loss)] == [1, 2, 8]


def test_a_resumed_run_is_that_which_was_never_stopped(tmp_path):
    whole, _ = run_stage(tmp_path / "whole", {2, 8})
    run_stage(tmp_path / "parts", {2, 8}, steps=3)
    resumed, told = run_stage(tmp_path / "parts", {2, 8})
    assert "resuming after 3 of 14" in told
    assert resumed.trainable == whole.trainable
    assert int(resumed.step) == STEPS


@pytest.mark.parametrize(("skips", "step"), [(False, 3), (True, 12)])
def test_too_many_in_succession_end_the_run(skips, step, tmp_path):
    with pytest.raises(ValueError, match=rf"step {step} is not finite .* --learning-rate below"):
        run_stage(tmp_path, range(2, STEPS), skips=skips)
    assert latest_step(tmp_path) == step - 1


def test_nine_and_a_good_one_do_not(tmp_path):
    state, _ = run_stage(tmp_path, {*range(1, 10), *range(11, STEPS)})
    assert float(state.trainable["w"]) == 1 + 11


def test_the_flag():
    assert FinetuneConfig().non_finite == "stop"
    with pytest.raises(ValueError, match="non_finite must be one of stop, skip, got 'ignore'"):
        FinetuneConfig(non_finite="ignore")  # pyright: ignore[reportArgumentType]
