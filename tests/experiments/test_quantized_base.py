"""A run on a quantised base: trained, resumed, refused by name, loaded and exported."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import ConversionError, export_pretrained, load_pretrained
from experiments.data import DataConfig
from experiments.finetune import finetune
from experiments.models import load_model
from experiments.training import FinetuneConfig
from experiments.training.config import CheckpointConfig, FitConfig
from experiments.training.metrics import read_metrics
from experiments.training.outcome import Outcome
from tptt_jax.config import LizaConfig, LoraConfig
from tptt_jax.training.checkpoint import latest_step, restore_trainable
from tptt_jax.training.description import read_description
from tptt_jax.training.partition import split_trainable


def run(config: FinetuneConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        finetune(config)


def losses(output):
    return [record.loss for record in read_metrics(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory):
    """A run of four steps, after a fit."""
    config = FinetuneConfig(
        model=str(tiny_model_dir),
        base_dtype="nf4",
        data=DataConfig(sequence_length=32, eval_tokens=40),
        liza=LizaConfig(softmax_window=8, softmax_sinks=2),
        fit=FitConfig(steps=2, length=32),
        lora=LoraConfig(rank=2),
        steps=4,
        checkpoints=CheckpointConfig(checkpoint_every=2),
        sample_tokens=0,
        output=tmp_path_factory.mktemp("quantised") / "run",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outcome, "plot", lambda self: None)
        run(config)
        yield config


def test_a_resumed_run_is_bit_equal(trained, tmp_path):
    output = tmp_path / "stopped"
    shutil.copytree(trained.output, output)
    shutil.rmtree(output / "checkpoints" / "4")
    assert latest_step(output) == 2
    resumed = replace(trained, output=output)
    run(resumed)
    assert losses(output) == losses(trained.output)
    values = []
    for folder in (output, trained.output):
        model = load_model(None, folder, dtype=jnp.dtype("float32"), base_dtype="nf4").model
        values.append(split_trainable(model, "lora")[1])
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[0])


def test_the_run_holds_what_is_trained_and_names_its_base(trained):
    assert read_description(trained.output).base_dtype == "nf4"
    recorded = json.loads((trained.output / "run.json").read_text())["base"]
    assert "stacks.0.mlp.up_proj.kernel.codes" in recorded
    model = load_pretrained(trained.model, trained.memory, trained.adapters, base_dtype="nf4")
    _, trainable, _ = split_trainable(model, "lora")
    assert not any("kernel.codes" in name for name in trainable)
    assert all(value.dtype == jnp.float32 for value in trainable.values())


@pytest.mark.parametrize("other", [None, "int8"])
def test_another_format_is_refused_by_name(trained, other):
    with pytest.raises(ValueError, match=f"base_dtype: nf4 in the run, {other} now"):
        run(replace(trained, base_dtype=other))


@pytest.mark.parametrize("mode", ["full", "projections"])
def test_base_weights_are_not_trained(trained, mode):
    with pytest.raises(ValueError, match=f"--train {mode} changes base weights, which --base-dt"):
        replace(trained, train=mode)


def test_a_base_that_was_trained_is_not_quantised(trained):
    base = load_pretrained(trained.model, base_dtype="int8")
    with pytest.raises(ValueError, match="needs base weights in full precision, not in int8"):
        split_trainable(base, "full")


def test_a_dry_run_counts_values_and_bytes(trained, tmp_path):
    report = {}
    for base_dtype in (None, "nf4"):
        config = replace(
            trained, base_dtype=base_dtype, no_liza=True, dry_run=True, output=tmp_path / "new"
        )
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            report[base_dtype] = finetune(config)
    assert "nf4, float32" in shown.getvalue().replace("\n", " ")
    plain, quantized = report[None], report["nf4"]
    assert quantized["base_parameters"] == plain["base_parameters"]
    assert quantized["trainable_parameters"] == plain["trainable_parameters"]
    model = load_pretrained(trained.model, base_dtype="nf4")
    assert quantized["base_bytes"] == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert quantized["base_bytes"] < plain["base_bytes"] / 3


def test_exports_take_the_full_weights(trained, tmp_path):
    quantized = load_pretrained(str(trained.output), base_dtype="nf4")
    with pytest.raises(ConversionError, match=r"quantised \(nf4\), but merged has them in full"):
        export_pretrained(quantized, tmp_path / "no", "merged", str(trained.output))
    export_pretrained(quantized, tmp_path / "peft", "peft", str(trained.output))
    # What `convert export` loads.
    whole = load_pretrained(str(trained.output))
    assert whole.base_dtype is None
    export_pretrained(whole, tmp_path / "merged", "merged", str(trained.output))
    merged = load_pretrained(tmp_path / "merged")
    base = load_pretrained(trained.model, trained.memory, trained.adapters)
    restore_trainable(trained.output, base)
    for path in ("q_proj", "o_proj"):
        expected = getattr(base.stacks[0].self_attn, path)
        delta = jnp.einsum("lir,lro->lio", expected.lora.a[...], expected.lora.b[...])
        kernel = expected.kernel[...] + expected.lora.scale * delta
        found = getattr(merged.stacks[0].self_attn, path).kernel[...]
        np.testing.assert_allclose(found, kernel, atol=1e-6)
