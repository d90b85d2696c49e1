"""--horizon-auto: the horizon of a run's memory is the longest row that it meets."""

from dataclasses import replace

import pytest

from experiments.data import DataConfig
from experiments.training import FinetuneConfig
from experiments.training.checks import resumed_description
from experiments.training.config.fit import FitConfig
from experiments.training.horizon import with_horizon
from tests.tiny import write_untrained_run
from tptt_jax.config import LizaConfig

LIZA = LizaConfig(softmax_window=32)
ASKED = {"recall": 0.5, "recall_trains": "memory"}


@pytest.fixture
def config(tmp_path):
    data = DataConfig(sequence_length=512)
    return FinetuneConfig(model="m", output=tmp_path / "run", liza=LIZA, data=data)


@pytest.mark.parametrize(
    ("changes", "horizon"),
    [
        ({}, 512),
        ({"fit": FitConfig(length=700)}, 700),
        ({"fit": FitConfig(length=700, steps=0)}, 512),
        ({"fit": FitConfig(length=700, steps=0, distill_steps=1), "steps": 0}, 700),
        ({"data": DataConfig(sequence_length=512, **ASKED)}, 512),
        ({"data": DataConfig(sequence_length=512, recall_length=900, **ASKED)}, 900),
        ({"fit": FitConfig(steps=0), "steps": 0}, None),
        ({"horizon_auto": False}, None),
        ({"liza": replace(LIZA, horizon=90)}, 90),
        ({"liza": replace(LIZA, alpha_gate="constant")}, None),
        ({"liza": LizaConfig()}, None),
        ({"liza": LizaConfig(writes="all", softmax_window=32)}, None),
    ],
    ids=str,
)
def test_it_is_the_longest_row_of_fit_and_training(config, changes, horizon):
    assert with_horizon(replace(config, **changes), None).liza.horizon == horizon


def test_a_run_keeps_its_own_and_another_run_at_least_that(config, tmp_path, tiny_model_dir):
    run = write_untrained_run(tmp_path, tiny_model_dir, horizon=600)
    mine = replace(config, output=run)
    assert _resolved(mine).liza.horizon == 600
    assert _resolved(replace(mine, resume=False)).liza.horizon == 512
    assert _resolved(replace(config, model=str(run))).liza.horizon == 600
    older = write_untrained_run(tmp_path / "older", tiny_model_dir)
    assert _resolved(replace(config, output=older)).liza.horizon is None


def _resolved(config):
    return with_horizon(config, resumed_description(config))
