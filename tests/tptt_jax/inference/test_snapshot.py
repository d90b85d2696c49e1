"""Saved states: complete or refused."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.contracts import random_tokens
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig, generate
from tptt_jax.config import NormConfig, flat_fields
from tptt_jax.inference.binding import first_fingerprint, hash_weights
from tptt_jax.inference.prefill import read
from tptt_jax.inference.snapshot import load_state, save_state

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


def test_the_hash_of_the_weights_is_the_same_in_another_process():
    code = (
        "from flax import nnx; from tptt_jax import *; "
        "from tptt_jax.inference.binding import hash_weights; "
        "config = ModelConfig.tiny(num_layers=2, mlp_dim=16); "
        "liza = LizaConfig(writes='all', softmax_window=7); "
        "print(hash_weights(CausalLM(config, liza, rngs=nnx.Rngs(0))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hash_weights(make())


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
    first_fingerprint(make())
    assert hashed[-1][1] == FIRST_OPTIONS
    # The model's settings are not nested in files.
    assert list(hashed[-1][0]) == list(flat_fields(ModelConfig))
    assert hashed[-1][0]["rope"].keys() == {
        *("theta", "scaling", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_positions",
    }


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
        lambda: make(dataclasses.replace(TINY, norm=NormConfig(eps=1e-5))),
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
    save_file({"hidden": np.zeros((1, 32), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match='its "format" is not'):
        load_state(tmp_path / "other.safetensors", make())
    with pytest.raises(FileNotFoundError, match="no such file"):
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


def test_states_of_another_setting_say_which(saved):
    for change, reason in (
        ({"softmax_window": 8}, "softmax_window: 7 in the state, 8 in the model"),
        ({"softmax_sinks": 2}, "softmax_sinks: 4 in the state, 2 in the model"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_state(saved, make(liza=dataclasses.replace(LIZA, **change)))
    with pytest.raises(ValueError, match="dtype: float32 in the state, bfloat16 in the model"):
        load_state(saved, make(dtype=jnp.bfloat16))


def difference(path, model):
    with pytest.raises(ValueError, match="another model has read it: ") as error:
        load_state(path, model)
    return str(error.value).partition("has read it: ")[2]


def test_nested_settings_are_named_one_by_one(saved, tmp_path):
    rope = dataclasses.replace(TINY.rope, scaling="linear", factor=3.0)
    told = difference(saved, make(dataclasses.replace(TINY, rope=rope)))
    assert told.startswith(
        "model.rope.scaling: none in the state, linear in the model; "
        "model.rope.factor: 1.0 in the state, 3.0 in the model)"
    )
    # Long values that differ beyond what is shown.
    kinds = ("full",) * 11
    long = dataclasses.replace(TINY, num_layers=12, sliding_window=4, layer_kinds=(*kinds, "full"))
    model = make(long, None)
    save_state(tmp_path / "long", model, read(model, TOKENS))
    other = dataclasses.replace(long, layer_kinds=(*kinds, "sliding"))
    told = difference(tmp_path / "long", make(other, None))
    assert told.startswith("model.layer_kinds: other values in the state than in the model")


def test_a_memory_that_one_side_lacks_is_named(saved, tmp_path):
    told = difference(saved, make(liza=None))
    assert "liza.operator: delta_product in the state, none in the model" in told
    save_state(tmp_path / "plain", make(liza=None), read(make(liza=None), TOKENS))
    told = difference(tmp_path / "plain", make())
    assert "liza.operator: none in the state, delta_product in the model" in told


def test_settings_that_do_not_count_are_not_named(saved):
    """ "auto" and "highest" compute the same; the weights are what differs."""
    told = difference(saved, make(liza=dataclasses.replace(LIZA, precision="highest"), seed=1))
    assert told.startswith("the settings agree, but weights or adapters have other values")


def test_names_in_a_file_are_those_of_the_first_states(content):
    caches = [f"softmax.full.{x}" for x in ("keys", "values", "sink_keys", "sink_values")]
    memory = [f"memory.{x}" for x in ("state", "history.keys", "history.values")]
    stack = [f"cache.stacks.0.{name}" for name in (*caches, *memory)]
    assert sorted(content[0]) == sorted(["cache.length", "hidden", "seen", *stack])


def test_a_state_in_memory_is_not_read_with_another_window():
    state = read(make(), TOKENS)
    for change, reason in (
        ({"softmax_window": 16}, "window: 7 in the state, 16 in the model"),
        ({"softmax_window": None}, "window: 7 in the state, none in the model"),
        ({"softmax_sinks": 5}, "softmax_sinks: 4 in the state, 5 in the model"),
    ):
        other = make(liza=dataclasses.replace(LIZA, **change))
        with pytest.raises(ValueError, match=reason):
            read(other, TOKENS, state=state)
        with pytest.raises(ValueError, match=reason):
            generate(other, TOKENS, 2, state=state)


KEYS, VALUES, SINKS = (
    f"cache.stacks.0.softmax.full.{name}" for name in ("keys", "values", "sink_keys")
)


def spoiled_lengths(value):
    return lambda arrays: arrays | {"cache.length": np.full(2, value, np.int32)}


def with_nan(arrays):
    arrays["hidden"][1, 3] = np.nan
    return arrays


# What a file without a checksum, from before there was one, may hold.
SPOILED = {
    "rank": (lambda x: x | {KEYS: x[KEYS][0, 0, 0]}, ", expected"),
    "no axis": (
        lambda x: x | {"hidden": np.zeros((), np.float32)},
        r"hidden must be \[B, E\], got shape \(\)",
    ),
    "slots": (
        lambda x: x | {KEYS: x[KEYS][:, :, :5]},
        "has 5 slots for keys but ",
    ),
    "sinks": (
        lambda x: x | {SINKS: x[SINKS][:, :, :1]},
        "has 1 sinks for keys but ",
    ),
    "window": (
        lambda x: x | {name: x[name][:, :, :5] for name in (KEYS, VALUES)},
        "window: 5 in the state, 7 in the model",
    ),
    "rows": (lambda x: x | {VALUES: x[VALUES][:, :1]}, ", expected"),
    "negative length": (spoiled_lengths(-5), "must have 0 to"),
    "huge length": (spoiled_lengths(2**31 - 1), "must have 0 to"),
    "length of floats": (lambda x: x | {"cache.length": np.ones(2, np.float32)}, ", expected"),
    "not a number": (with_nan, "hidden holds values that are not finite"),
    "neither true nor false": (
        lambda x: x | {"seen": np.full(x["seen"].shape, 7, np.uint8).view(bool)},
        "neither true nor false",
    ),
    "missing": (lambda x: {k: v for k, v in x.items() if k != KEYS}, "it lacks cache"),
    "more": (lambda x: x | {"strange": np.zeros(2, np.float32)}, "this model does not have"),
}


@pytest.fixture(scope="module")
def content(saved):
    with safe_open(saved, "numpy") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED)
def test_impossible_states_are_refused(content, spoil, reason, tmp_path):
    arrays, _ = content
    old = {"format": "tptt_jax read state 1", "model": first_fingerprint(make())}
    spoiled = spoil({name: np.array(value) for name, value in arrays.items()})
    save_file(spoiled, tmp_path / "a.state", metadata=old)
    with pytest.raises(ValueError, match=reason) as error:
        load_state(tmp_path / "a.state", make())
    assert len(str(error.value).splitlines()) == 1
    # Whole files of those days are as good as ever.
    save_file(arrays, tmp_path / "a.state", metadata=old)
    assert load_state(tmp_path / "a.state", make()).length.tolist() == [30, 30]


@pytest.mark.parametrize("settings", ["{", "[" * 100_000, "[1]", '{"model.rope": 3}'])
def test_damaged_settings_of_another_model_are_one_line(content, settings, tmp_path):
    arrays, metadata = content
    first = {"format": "tptt_jax read state 1", "model": "0" * 64}
    for changed in (metadata, first):
        save_file(arrays, tmp_path / "a.state", metadata=changed | {"settings": settings})
        assert "\n" not in difference(tmp_path / "a.state", make())


def test_settings_that_a_state_does_not_know_have_their_defaults(content, tmp_path):
    arrays, metadata = content
    settings = json.loads(metadata["settings"])

    def write(changed):
        metadata["settings"] = json.dumps(changed)
        save_file(arrays, tmp_path / "a.state", metadata=metadata)
        return tmp_path / "a.state"

    later = ("liza.precision", "model.final_softcap", "model.rope.mscale")
    older = write({name: value for name, value in settings.items() if name not in later})
    assert load_state(older, make()).length.tolist() == [30, 30]
    told = difference(older, make(liza=dataclasses.replace(LIZA, precision="default")))
    assert told.startswith("liza.precision: auto in the state, default in the model)")
    told = difference(write(settings | {"liza.later": 3}), make())
    assert told.startswith("liza.later: 3 in the state, none in the model)")


def test_a_flipped_bit_is_noticed(saved, tmp_path):
    whole = saved.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    for place in np.linspace(first, len(whole) - 1, 7, dtype=int):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "a.state").write_bytes(changed)
        with pytest.raises(ValueError, match="has changed since it was saved"):
            load_state(tmp_path / "a.state", make())


def test_a_full_disk_leaves_the_old_state(saved, tmp_path):
    """The limit on the size of files stands for the disk; it belongs to a process of its own."""
    shutil.copy(saved, tmp_path / "a.state")
    program = """
import resource, sys
import numpy as np
from tests.tptt_jax.inference.test_snapshot import TOKENS, make, read, save_state
model = make()
state = read(model, TOKENS)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_state(sys.argv[1], model, state)
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.state")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "a.state" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]
    assert (tmp_path / "a.state").read_bytes() == saved.read_bytes()
