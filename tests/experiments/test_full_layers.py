"""--full-layers-auto: which layers are chosen, and that a run that goes on keeps them."""

import io
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from experiments.command_line import parse_arguments
from experiments.data import DataConfig
from experiments.finetune import finetune
from experiments.training import FinetuneConfig, full_layers
from experiments.training.checks import resumed_description
from experiments.training.config import FitConfig
from experiments.training.full_layers import with_written_layers
from experiments.training.prepare import prepare_run
from tptt_jax import LizaConfig
from tptt_jax.training.description import read_description
from tptt_jax.training.layer_gaps import choose_full_layers


def prepared(config):
    """What a run writes before it trains, and what it prints."""
    out = io.StringIO()
    run = prepare_run(config, Console(file=out, soft_wrap=True))
    return run, out.getvalue()


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("a state is read with two keys, " * 60)
    return FinetuneConfig(
        model=str(tiny_model_dir),
        output=tmp_path / "run",
        data=DataConfig(path=str(tmp_path / "text.txt"), sequence_length=32, eval_tokens=40),
        liza=LizaConfig(softmax_window=8, softmax_sinks=2, memory_rank=2),
        fit=FitConfig(steps=2, distill_steps=1, length=48),
        full_layers_auto=1,
        steps=1,
        batch_size=1,
        sample_tokens=0,
    )


def test_a_run_writes_its_choice_down_and_keeps_it(config, monkeypatch):
    gaps = {}

    def spy(*args):
        gaps.update(measured(*args))
        return gaps

    measured = full_layers.layer_gaps
    monkeypatch.setattr(full_layers, "layer_gaps", spy)
    run, text = prepared(with_written_layers(config, resumed_description(config)))
    assert list(gaps) == [0, 1, 2]
    chosen = max(gaps, key=lambda layer: gaps[layer])
    line = f"full attention stays in layers {chosen}: the window of 8 throws their output off by "
    assert f"{line}{gaps[chosen]:.1%} of the residual stream, others by " in text
    liza = replace(config.liza, full_layers=(chosen,))
    assert run.model.liza == read_description(config.output).liza == liza
    assert run.fit_rows is not None
    saved = yaml.safe_load((config.output / "config.yaml").read_text())
    assert (saved["liza"]["full_layers"], saved["full_layers_auto"]) == ([chosen], 0)
    written = parse_arguments(["--config", str(config.output / "config.yaml")], FinetuneConfig)
    assert written.liza == liza

    def fail(*_):
        raise AssertionError("a run that goes on must not choose again")

    monkeypatch.setattr(full_layers, "layer_gaps", fail)
    again, text = prepared(with_written_layers(config, resumed_description(config)))
    assert again.model.liza == liza
    assert "full attention stays" not in text
    with pytest.raises(ValueError, match=rf"holds a run with full layers {chosen}, where --full-"):
        finetune(replace(config, full_layers_auto=2))


def test_what_cannot_be_chosen_is_refused_before_anything_is_written(config):
    with pytest.raises(ValueError, match="3 full layers were asked for, but of this model's 3"):
        finetune(replace(config, full_layers_auto=3))
    with pytest.raises(ValueError, match=r"give --liza\.softmax-window"):
        replace(config, liza=LizaConfig())
    with pytest.raises(ValueError, match="give one of the two"):
        replace(config, liza=replace(config.liza, full_layers=(1,)))
    assert not config.output.exists()


def test_the_largest_gaps_are_chosen():
    gaps = {2: 0.1, 5: 0.4, 7: 0.4, 9: 0.2}
    assert [choose_full_layers(gaps, count) for count in (1, 2, 3)] == [(5,), (5, 7), (5, 7, 9)]
    for count in (0, 4):
        with pytest.raises(ValueError, match="1 to 3 can keep it"):
            choose_full_layers(gaps, count)
