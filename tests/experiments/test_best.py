"""Training that ends when the held-out loss no longer falls, and keeps the best weights."""

import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest

from convert import load_pretrained
from experiments.data import DataConfig
from experiments.finetune import finetune
from experiments.training import FinetuneConfig
from experiments.training.best import BestState, has_stopped_early
from experiments.training.config import CheckpointConfig, FitConfig, HeldOutConfig, OptimizerConfig
from experiments.training.metrics import StepRecord, read_metrics
from tests.experiments.shared_steps import share_steps
from tptt_jax import LizaConfig
from tptt_jax.training.checkpoint import latest_step, restore_trainable


def records(*losses: float | None) -> list[StepRecord]:
    return [
        StepRecord(step=i, loss=1.0, tokens_per_s=1.0, seconds=1.0, eval_loss=loss)
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, None, 2.5, None], 2, False),
        ([3.0, 2.0, None, 2.5, None, 2.1], 2, True),
        ([2.0, 2.0, 2.0], 2, True),
        ([2.0, math.nan, math.nan], 2, True),
        ([math.nan, math.nan, 2.0], 1, False),
        ([2.0, 3.0, 4.0], None, False),
        ([None, None], 1, False),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_lower_loss(losses, patience, ends):
    assert has_stopped_early(records(*losses), patience) is ends


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with share_steps():
        yield


@pytest.fixture(scope="module")
def config(tiny_model_dir, tmp_path_factory):
    """A rate of zero: the first evaluation is the best one."""
    return FinetuneConfig(
        model=str(tiny_model_dir),
        data=DataConfig(sequence_length=48, eval_tokens=96),
        liza=LizaConfig(softmax_window=8, softmax_sinks=2),
        fit=FitConfig(steps=0, distill_steps=0),
        steps=9,
        batch_size=1,
        accumulate=2,
        optimizer=OptimizerConfig(learning_rate=0.0),
        checkpoints=CheckpointConfig(checkpoint_every=2, keep_last=3),
        held_out=HeldOutConfig(eval_every=2, early_stop=2, keep_best=True),
        sample_tokens=0,
        output=tmp_path_factory.mktemp("runs") / "early",
    )


def printed(config: FinetuneConfig) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        finetune(config)
    return out.getvalue()


def kept(output: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (output / "checkpoints").iterdir())


def test_a_run_ends_early_and_goes_on_when_asked(config):
    output = config.output
    told = printed(config)
    assert "trained to step 6 (stopped early); the lowest held-out loss was at step 2" in told
    assert f", kept in {output / 'best'}\n" in told
    assert kept(output) == [2, 4, 6]
    assert latest_step(output / "best") == 2
    measured = [r.step for r in read_metrics(output / "metrics.jsonl") if r.eval_loss is not None]
    assert measured == [2, 4, 6]

    before = (output / "metrics.jsonl").read_bytes()
    assert "stopped early (6; --steps 9): nothing is trained; raise --early-stop" in printed(config)
    assert (output / "metrics.jsonl").read_bytes() == before

    # The last step is evaluated too, as it could be the best one.
    longer = replace(
        config,
        checkpoints=replace(config.checkpoints, keep_last=1),
        held_out=replace(config.held_out, early_stop=9),
    )
    assert "trained to step 9; the lowest held-out" in printed(longer)
    assert kept(output) == [9]
    measured = [r.step for r in read_metrics(output / "metrics.jsonl") if r.eval_loss is not None]
    assert measured == [2, 4, 6, 8, 9]


def test_the_best_weights_load_like_a_run(config):
    model = load_pretrained(config.model, config.memory, config.adapters)
    assert restore_trainable(config.output / "best", model) == 2


def test_a_better_step_that_a_kill_has_undone_is_forgotten(tmp_path):
    """Its weights are of a course that is run again from the last checkpoint."""
    given: dict = {"description": None, "keep_best": True, "early_stop": None}
    best = BestState(tmp_path, first_step=0, **given)
    assert best.step is None
    assert best.best_folder is None
    (tmp_path / "best" / "checkpoints" / "4").mkdir(parents=True)
    assert latest_step(tmp_path / "best") == 4
    BestState(tmp_path, first_step=2, **given)
    assert latest_step(tmp_path / "best") is None


@pytest.mark.parametrize("changes", [{"early_stop": 2}, {"keep_best": True}])
def test_evaluations_are_needed(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} needs .* add --eval-every"):
        HeldOutConfig(**changes)
    with pytest.raises(ValueError, match="early_stop must be at least 1, got 0"):
        HeldOutConfig(early_stop=0, eval_every=1)
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        CheckpointConfig(keep_last=0)
