"""A Titan without one of its parts, and its report by evaluate."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.command_line import run_configured
from experiments.data import DataConfig
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.evaluation import ablation
from experiments.evaluation.ablation import AS_IT_IS, PARTS, Ablation, without_part
from experiments.evaluation.variants import MEMORY
from tests.contracts import random_tokens
from tests.tiny import make_tokenizer
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.inference.score import token_losses
from tptt_jax.layers.parameters import MemoryParam
from tptt_jax.model import base_model, replace_memory

WINDOW = 16
TEXT = random_tokens((90,), seed=3)


def make_titan(**changes):
    """A Titan whose memory is far from what it is before a fit."""
    liza = LizaConfig(softmax_window=WINDOW, softmax_sinks=2, memory_rank=2, **changes)
    model = CausalLM(ModelConfig.tiny(num_layers=2), liza, rngs=nnx.Rngs(0))
    _, of_memory, _ = nnx.split(model, MemoryParam, ...)
    leaves, tree = jax.tree.flatten(of_memory)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, noisy))
    return model


def losses(model, **options):
    return np.concatenate([*token_losses(model, [TEXT], **options)])


def attention(model):
    return model.stacks[0].self_attn


def test_without_its_window_a_titan_is_its_base_model():
    model = make_titan()
    np.testing.assert_allclose(
        losses(without_part(model, "window", TEXT)), losses(base_model(model)), rtol=1e-6
    )


def test_without_decay_nothing_is_forgotten():
    model, want = make_titan(), make_titan()
    keep = attention(want).memory.gates.keep
    keep.kernel[...] = jnp.zeros_like(keep.kernel[...])
    keep.bias[...] = jnp.full_like(keep.bias[...], 40.0)
    changed = losses(without_part(model, "decay", TEXT))
    np.testing.assert_allclose(changed, losses(want), rtol=1e-5)
    assert not np.allclose(changed, losses(model), rtol=1e-4)


def test_without_deltas_their_products_are_zero():
    model, want = make_titan(), make_titan()
    memory = attention(want).memory
    for delta in (memory.q_delta, memory.k_delta, memory.v_delta):
        delta.b[...] = jnp.zeros_like(delta.b[...])
    changed = losses(without_part(model, "deltas", TEXT))
    np.testing.assert_allclose(changed, losses(want), rtol=1e-5)
    assert not np.allclose(changed, losses(model), rtol=1e-4)


def test_without_sinks_the_window_sees_its_own_tokens_alone():
    changed = without_part(make_titan(), "sinks", TEXT)
    want = replace_memory(
        make_titan(), LizaConfig(softmax_window=WINDOW, softmax_sinks=0, memory_rank=2)
    )
    np.testing.assert_array_equal(losses(changed), losses(want))
    assert not np.allclose(losses(changed), losses(make_titan()), rtol=1e-4)


def test_without_its_gate_a_head_has_its_mean_share():
    model = make_titan()
    gate = attention(model).mag
    # Shares that do not depend on anything: the mean is the share, and nothing changes.
    gate.weight[...] = jnp.zeros_like(gate.weight[...])
    gate.slope[...] = jnp.zeros_like(gate.slope[...])
    gate.bias[...] = jnp.full_like(gate.bias[...], 60.0)
    changed = without_part(model, "gate", TEXT)
    assert changed.liza.mag == "learned"
    np.testing.assert_allclose(losses(changed), losses(model), rtol=1e-4)
    model = make_titan()
    shares = jax.nn.sigmoid(attention(without_part(model, "gate", TEXT)).mag.logit[...])
    assert shares.shape == (2, model.config.num_heads)
    assert float(jnp.ptp(shares)) > 0.01


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"alpha_gate": "constant"}, "decay"),
        ({"mag": "learned"}, "gate"),
    ],
    ids=["decay", "gate"],
)
def test_a_part_that_is_not_there_cannot_be_switched_off(changes, missing):
    model = make_titan(**changes)
    assert without_part(model, missing, TEXT) is None
    assert without_part(model, AS_IT_IS, TEXT) is model


def test_a_memory_that_needs_other_parameters_is_refused():
    with pytest.raises(ValueError, match=r"mag.logit must have shape \(2, 4\), the model has none"):
        replace_memory(
            make_titan(), LizaConfig(softmax_window=WINDOW, mag="learned", memory_rank=2)
        )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The with statement is a statement.\nIt ends.\n" * 60)
    return path


def test_what_each_part_costs(text, tmp_path):
    tokenizer = make_tokenizer(begin=True)
    task = Ablation(DataConfig(path=str(text)), 200)
    rows = task.rows(tokenizer)
    liza = LizaConfig(softmax_window=WINDOW, horizon=40)
    model = CausalLM(ModelConfig.tiny(num_layers=1, vocab_size=500), liza, rngs=nnx.Rngs(0))
    results = [task.measure(model, tokenizer, row, use_memory=True) for row in rows]
    found = {MEMORY: results}
    report = task.summarize("tiny", rows, found).report["without"]
    assert list(report) == [AS_IT_IS, *PARTS]
    off = np.concatenate([*token_losses(model, [rows[0].data], use_memory=False)])
    on = np.concatenate([*token_losses(model, [rows[0].data])])
    assert report["memory"]["cost"] == pytest.approx(float(off.mean() - on.mean()), abs=1e-6)
    assert report["memory"]["error"] > 0
    assert report[AS_IT_IS]["perplexity"] == pytest.approx(float(np.exp(on.mean())), rel=1e-5)
    task.plot(tmp_path / "a.png", {"tiny": rows}, {"tiny": found})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_within_the_window_says_so(text):
    tokenizer = make_tokenizer(begin=True)
    liza = LizaConfig(softmax_window=WINDOW)
    model = CausalLM(ModelConfig.tiny(num_layers=1, vocab_size=500), liza, rngs=nnx.Rngs(0))
    task = Ablation(DataConfig(path=str(text)), WINDOW)
    row = task.rows(tokenizer)[0]
    with pytest.raises(ValueError, match="and none of them leaves the window of 16"):
        task.measure(model, tokenizer, row, use_memory=True)


def test_a_window_longer_than_the_usual_sample_has_a_mean_share(text, monkeypatch):
    monkeypatch.setattr(ablation, "_GATE_TOKENS", 8)
    tokenizer = make_tokenizer(begin=True)
    liza = LizaConfig(softmax_window=WINDOW)
    model = CausalLM(ModelConfig.tiny(num_layers=1, vocab_size=500), liza, rngs=nnx.Rngs(0))
    task = Ablation(DataConfig(path=str(text)), 100)
    row = next(row for row in task.rows(tokenizer) if row.about["off"] == "gate")
    assert all(np.isfinite(task.measure(model, tokenizer, row, use_memory=True)["nats"]))


def test_a_base_model_has_nothing_to_switch_off(text, tiny_model_dir, tmp_path, capsys):
    given = ["--task", "ablate", "--model", str(tiny_model_dir), "--data", str(text), "--json"]
    given += ["--output", str(tmp_path / "out")]
    assert run_configured(evaluate, EvaluateConfig, given) == 0
    out = capsys.readouterr().out.splitlines()
    assert any("has no memory: nothing was switched off" in line for line in out)
    assert json.loads(out[-1])["models"][str(tiny_model_dir)]["tasks"]["ablate"] == {}
