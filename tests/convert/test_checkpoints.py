"""Our own checkpoints as a source: load, export, inspect."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import ConversionError, export_pretrained, load_pretrained
from convert.__main__ import main
from convert.formats import SafetensorsDirectory
from tests.convert.checkpoints import LLAMA, write_directory
from tests.convert.test_pretrained import fill_adapters, values_of
from tptt_jax import CausalLM, LizaConfig, LoraConfig
from tptt_jax.training.checkpoint import RunCheckpoints
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import TrainState

LIZA = LizaConfig(softmax_window=5, mag="scheduled", mag_init=0.1)
LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))


def save_run(path, base, liza, lora) -> CausalLM:
    """Writes a run's directory after one step; returns the model that it trained."""
    model = load_pretrained(base, liza, lora)
    fill_adapters(model)
    _, trainable, _ = split_trainable(model, "lora")
    share = None if model.mag_share is None else jnp.float32(0.4)
    state = TrainState(trainable, (), share, jnp.int32(1), jax.random.key(0))
    write_description(path, Description(source=str(base), liza=liza, lora=lora, train="lora"))
    with RunCheckpoints(path) as checkpoints:
        checkpoints.save(state)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory after one step, and the values that it trained."""
    base = write_directory(tmp_path_factory.mktemp("base") / "llama", LLAMA)
    path = tmp_path_factory.mktemp("run") / "out"
    return path, save_run(path, base, LIZA, LORA)


def test_load(run):
    path, trained = run
    model = load_pretrained(path)
    assert (model.liza, model.lora) == (LIZA, LORA)
    wanted = values_of(trained) | {"mag_share": np.float32(0.4)}
    jax.tree.map(np.testing.assert_array_equal, values_of(model), wanted)


def test_merged_export_takes_config_and_weights_of_the_source(run, tmp_path):
    path, trained = run
    export_pretrained(load_pretrained(path), tmp_path / "a", source=path)
    export_pretrained(trained, tmp_path / "b")
    a, b = SafetensorsDirectory(tmp_path / "a"), SafetensorsDirectory(tmp_path / "b")
    assert a.tensors == b.tensors
    for name in a.tensors:
        np.testing.assert_array_equal(a.read(name), b.read(name))


def test_commands(run, tmp_path, monkeypatch, capsys):
    path, _ = run
    monkeypatch.setattr("sys.argv", ["convert", "inspect", str(path), "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["checkpoint"] == str(path)
    assert found["family"] == "llama"
    assert (found["liza"], found["lora"]) == (True, True)
    monkeypatch.setattr("sys.argv", ["c", "export", str(path), "--output", str(tmp_path / "o")])
    assert main() == 0
    assert load_pretrained(tmp_path / "o").liza is None


def test_a_run_without_a_checkpoint_yet(run, tmp_path):
    path, _ = run
    (tmp_path / "checkpoint.json").write_bytes((path / "checkpoint.json").read_bytes())
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_pretrained(tmp_path)


def test_a_checkpoint_whose_source_is_gone(tmp_path):
    gone = str(tmp_path / "gone")
    write_description(tmp_path, Description(source=gone, liza=None, lora=None, train="lora"))
    with pytest.raises(ConversionError, match=r"no such file or directory: .*gone"):
        load_pretrained(tmp_path)
