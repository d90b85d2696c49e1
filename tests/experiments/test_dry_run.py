"""A dry run says what a run would take, and leaves nothing behind."""

import json
from dataclasses import replace

import pytest

from convert import load_pretrained
from experiments.data import DataConfig
from experiments.finetune import finetune, run_finetune
from experiments.training import FinetuneConfig
from experiments.training.config import FitConfig
from tptt_jax import LizaConfig, state_bytes
from tptt_jax.training.partition import split_trainable


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    return FinetuneConfig(
        model=str(tiny_model_dir),
        data=DataConfig(sequence_length=64, eval_tokens=96),
        liza=LizaConfig(softmax_window=8, softmax_sinks=2),
        fit=FitConfig(steps=3),
        steps=5,
        batch_size=4,
        sample_tokens=0,
        dry_run=True,
        output=tmp_path / "run",
    )


def test_the_sizes_are_those_of_the_arrays(config, capsys):
    report = finetune(config)
    model = load_pretrained(config.model, config.memory, config.adapters)
    _, trainable, _ = split_trainable(model, "lora")
    count = sum(x.size for x in trainable.values())
    assert report["trainable_parameters"] == count
    assert report["trainable_bytes"] == 4 * count
    # Two moments of AdamW, and a few counters.
    assert 8 * count <= report["optimizer_bytes"] < 8 * count + 100
    assert report["base_bytes"] == 4 * report["base_parameters"]
    assert report["state_bytes_per_sequence"] == state_bytes(
        model.config, model.liza, max_tokens=64
    )
    assert report["rows_per_step"] == 4
    assert report["step_bytes"] > 0
    assert not config.output.exists()
    shown = capsys.readouterr().out
    assert f"{count:,}" in shown
    assert "5 steps of 4 rows" in shown

    # A quarter of the rows at a time takes less.
    in_parts = finetune(replace(config, batch_size=1, accumulate=4))
    assert in_parts["rows_per_step"] == 4
    assert in_parts["step_bytes"] < 0.6 * report["step_bytes"]


def test_rows_for_the_memory_alone_are_part_of_a_step(config, capsys):
    apart = {"recall": 0.5, "recall_trains": "memory", "recall_length": 320}
    data = replace(config.data, sequence_length=256, **apart)
    report = finetune(replace(config, data=data, batch_size=2))
    assert (report["rows_per_step"], report["rows_for_the_memory_per_step"]) == (2, 2)
    assert report["tokens_in_first_step"] == 2 * 256 + 2 * 320
    assert "5 steps of 2 rows and 2 for the memory alone" in capsys.readouterr().out


def test_the_command_prints_json(config, capsys):
    flags = ["--model", config.model, "--data.sequence-length", "64", "--liza.softmax-window", "8"]
    flags += ["--output", str(config.output), "--dry-run", "--json", "--steps", "2"]
    assert run_finetune(finetune, flags) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["dry_run"] is True
    assert report["steps"] == 2
    assert not config.output.exists()
