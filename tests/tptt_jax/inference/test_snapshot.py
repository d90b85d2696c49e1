"""Saved states: whole or refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import random_tokens
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig, generate
from tptt_jax.inference.prefill import read
from tptt_jax.inference.snapshot import load_state, model_fingerprint, save_state

TINY = ModelConfig.tiny(num_layers=2, mlp_dim=16)
LIZA = LizaConfig(writes="all", softmax_window=7)
CONFIGS = {
    "base": (TINY, None, jnp.float32),
    "window": (TINY, LIZA, jnp.float32),
    "bfloat16": (TINY, LIZA, jnp.bfloat16),
    "no softmax": (TINY, LizaConfig(writes="all", softmax=False), jnp.float32),
}
TOKENS = random_tokens((2, 30))


def make(config=TINY, liza=LIZA, dtype=jnp.float32, seed=0, lora=None):
    return CausalLM(config, liza, lora, dtype=dtype, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("states") / "document.state"
    save_state(path, make(), read(make(), TOKENS))
    return path


@pytest.mark.parametrize(("config", "liza", "dtype"), CONFIGS.values(), ids=CONFIGS)
def test_a_loaded_state_goes_on_as_the_saved_one(config, liza, dtype, tmp_path):
    model, path = make(config, liza, dtype), tmp_path / "folder" / "document.state"
    state = read(model, TOKENS)
    save_state(path, model, state)
    loaded = load_state(path, make(config, liza, dtype))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    want = generate(model, TOKENS, 6).tokens
    assert np.array_equal(generate(model, TOKENS[:, :0], 6, state=loaded).tokens, want)
    assert [file.name for file in path.parent.iterdir()] == ["document.state"]


def test_a_state_without_memory_stays_without(tmp_path):
    model, path = make(), tmp_path / "plain.state"
    save_state(path, model, read(model, TOKENS, use_memory=False))
    loaded = load_state(path, model)
    assert not loaded.has_memory
    with pytest.raises(ValueError, match="use_memory=False"):
        generate(model, TOKENS, state=loaded)


def test_the_fingerprint_is_the_same_in_another_process():
    code = (
        "from flax import nnx; from tptt_jax import *; "
        "from tptt_jax.inference.snapshot import model_fingerprint; "
        "config = ModelConfig.tiny(num_layers=2, mlp_dim=16); "
        "liza = LizaConfig(writes='all', softmax_window=7); "
        "print(model_fingerprint(CausalLM(config, liza, rngs=nnx.Rngs(0))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == model_fingerprint(make())


# The memory of LIZA as it was hashed before `precision` and `writes` were options.
FIRST_OPTIONS = {
    **{"operator": "delta_product", "num_householder": 2, "trick": "derivative"},
    **{"beta_gate": "k", "alpha_gate": "constant", "state_activation": "none"},
    **{"vector_beta": False, "expand_gates": False, "mag": "learned", "mag_init": 0.05},
    **{"linear_scale": "match", "cross_gate": False, "softmax": True, "softmax_window": 7},
    **{"softmax_sinks": 4, "chunk_size": 64, "memory_rank": 0, "memory_alpha": 16.0},
    "dropout": 0.0,
}


def test_states_from_before_there_were_more_options_are_still_read(monkeypatch):
    hashed, dumps = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda x, **kw: (hashed.append(x), dumps(x, **kw))[1])
    model_fingerprint(make())
    assert hashed[0][1] == FIRST_OPTIONS


def changed_weight():
    model = make()
    kernel = model.stacks[0].mlp.down_proj.kernel
    kernel[...] = kernel[...].at[1, 3, 5].add(1e-7)
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: make(seed=1),
        lambda: make(liza=dataclasses.replace(LIZA, softmax_window=8)),
        lambda: make(liza=dataclasses.replace(LIZA, mag_init=0.06)),
        lambda: make(liza=dataclasses.replace(LIZA, precision="default")),
        lambda: make(liza=None),
        lambda: make(dtype=jnp.bfloat16),
        lambda: make(dataclasses.replace(TINY, norm_eps=1e-5)),
        lambda: make(lora=LoraConfig(rank=2)),
        changed_weight,
    ],
    ids=[
        *("seed", "window", "share", "precision", "base", "dtype", "epsilon", "adapter"),
        "one weight",
    ],
)
def test_another_model_is_refused(other, saved):
    with pytest.raises(ValueError, match="another model has read it"):
        load_state(saved, other())


@pytest.mark.parametrize("size", [0, 5, 200, -1], ids=["empty", "5 bytes", "header", "last byte"])
def test_a_cut_file_is_refused(size, saved, tmp_path):
    path = tmp_path / "cut.state"
    path.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match="cannot be continued from"):
        load_state(path, make())


def test_another_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"hidden": np.zeros((1, 32), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match='its "format" is not'):
        load_state(tmp_path / "other.safetensors", make())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_state(tmp_path / "none", make())


def test_a_failed_write_leaves_the_old_state(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("tptt_jax.inference.snapshot.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_state(saved, make(), read(make(), TOKENS))
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
