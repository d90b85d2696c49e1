"""Losses by position against whole forward passes, and the context benchmark."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.command_line import run_command
from experiments.benchmarks.long_context import bench_context
from tests.contracts import random_tokens
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.inference import score

LIZA = {
    "base": None,
    "evicted": LizaConfig(softmax_window=7),
    "window": LizaConfig(writes="all", softmax_window=7, mag_init=0.5),
    "no softmax": LizaConfig(writes="all", softmax=False),
}


@pytest.mark.parametrize("liza", LIZA.values(), ids=LIZA)
@pytest.mark.parametrize("length", [2, 16, 17, 60])
def test_losses_are_those_of_a_whole_forward_pass(liza, length, monkeypatch):
    monkeypatch.setattr(score, "SEGMENT_TOKENS", 16)
    model = CausalLM(ModelConfig.tiny(num_layers=2), liza, rngs=nnx.Rngs(0))
    tokens = random_tokens((1, length))
    logits = jax.nn.log_softmax(model(jnp.asarray(tokens)).logits[0, :-1].astype(jnp.float32))
    want = -np.take_along_axis(np.asarray(logits), tokens[0, 1:, None], axis=1)[:, 0]
    pieces = np.array_split(tokens[0], [min(5, length), min(6, length), min(40, length)])
    got = np.concatenate(list(score.token_losses(model, pieces)))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The with statement is a statement.\nIt ends.\n" * 100)
    return path


def test_bench_context_measures_and_draws(text, tiny_model_dir, tmp_path, capsys):
    peer = tmp_path / "peer.json"
    peer.write_text('{"runs": {"peer": [{"context": 128, "decode_s_per_token": 0.1}]}}')
    arguments = ["--model", str(tiny_model_dir), "--contexts", "128", "600", "--window", "16"]
    arguments += ["--data", str(text), "--new-tokens", "64", "--full-read-limit", "128"]
    arguments += ["--peer-json", str(peer), "--output", str(tmp_path / "out"), "--json"]
    assert run_command(bench_context, arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out" / "context.json").read_text())
    titan, full = report["runs"]["Titan, window 16"], report["runs"]["full softmax"]
    assert titan[0]["state_bytes"] == titan[1]["state_bytes"]
    assert full[1]["state_bytes"] > full[0]["state_bytes"]
    assert full[1]["prefill_s_per_token"] is None
    assert all(result["decode_s_per_token"] > 0 for result in titan + full)
    assert report["runs"]["peer"] == [{"context": 128, "decode_s_per_token": 0.1}]
    assert (tmp_path / "out" / "context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "50"], "contexts"),
        (["--contexts", "4096", "1024"], "contexts"),
        (["--new-tokens", "8"], "new_tokens"),
        (["--peer-json", __file__], "must hold"),
    ],
    ids=["short", "descending", "few", "peer"],
)
def test_bench_context_refuses(arguments, message, capsys):
    assert run_command(bench_context, arguments) == 2
    assert message in capsys.readouterr().err
