"""State tracking: groups, update rules, small trials with the expected successes and failures."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import state_tracking
from experiments.command_line import run_configured
from experiments.state_tracking import TrackingConfig, track_states
from experiments.tracking.groups import draw_words, multiplication_table, word_elements
from experiments.tracking.model import Tracker, Variant
from experiments.tracking.summary import accuracies, spans
from experiments.tracking.trial import Training, Trial, run_trial
from tests.contracts import quick_jit
from tptt_jax import LinearAttention, LizaConfig

TRAINING = Training(
    **{"length": 16, "short_length": 8, "test_length": 64, "test_words": 64, "steps": 160},
    **{"batch_size": 32, "learning_rate": 1e-2, "dim": 32, "heads": 8},
)


# --- groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("parity", 2), ("s3", 6), ("s4", 24), ("s5", 120)])
def test_tables_are_those_of_groups(name, size):
    table = multiplication_table(name)
    assert table.shape == (size, size)
    np.testing.assert_array_equal(table[0], np.arange(size))
    np.testing.assert_array_equal(table[:, 0], np.arange(size))
    for line in (*table, *table.T):
        assert set(line) == set(range(size))
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 200))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert np.array_equal(table, table.T) == (name == "parity")


def test_words_are_multiplied_from_left_to_right():
    table = multiplication_table("s3")
    used = jnp.asarray(word_elements("s3"))
    words = draw_words(jax.random.key(0), jnp.asarray(table), used, batch_size=5, length=9)
    for elements, products in zip(*map(np.asarray, words), strict=True):
        expected = itertools.accumulate(elements, lambda a, b: table[a, b])
        assert products.tolist() == list(expected)


@pytest.mark.parametrize(("name", "number"), [("s3", 6), ("s5-2", 11), ("s5-3", 31), ("s5", 120)])
def test_words_of_few_elements_reach_the_whole_group(name, number):
    table, used = multiplication_table(name), word_elements(name)
    assert len(used) == number
    reached = {0}
    for _ in range(10):
        reached |= {int(table[a, b]) for a in reached for b in used}
    assert len(reached) == len(table)
    words = draw_words(
        jax.random.key(0), jnp.asarray(table), jnp.asarray(used), batch_size=64, length=64
    )
    assert set(np.asarray(words.elements).ravel()) == set(used)


# --- the layer -------------------------------------------------------------------------------


def test_a_step_with_beta_2_reflects_and_with_beta_1_erases():
    """The change of the state, k (v - S^T k) beta, from the layer itself."""
    config = LizaConfig(writes="all", operator="delta_rule", beta_gate="projected")
    states = {}
    for beta_max in (1.0, 2.0):
        layer = LinearAttention(8, 1, config=config, beta_max=beta_max, rngs=nnx.Rngs(0))
        gates = layer.memory.gates
        assert gates is not None
        gates.beta.bias[...] = jnp.full(1, 40.0)
        layer.v_proj.kernel[...] = jnp.zeros((8, 8))
        state = layer.init_state(1)
        full = state._replace(state=jax.random.normal(jax.random.key(1), state.state.shape))
        x = jax.random.normal(jax.random.key(2), (1, 1, 8))
        _, after = layer.extend(x, full, jnp.zeros(1, jnp.int32))
        states[beta_max] = np.asarray(after.state[0, 0])
        start = np.asarray(full.state[0, 0])
        np.testing.assert_allclose(
            np.linalg.matrix_rank(states[beta_max] - start, tol=1e-4), 1, err_msg=str(beta_max)
        )
    assert np.linalg.matrix_rank(states[1.0], tol=1e-4) == 7
    grams = [s.T @ s for s in (states[2.0], start)]
    np.testing.assert_allclose(*grams, atol=1e-4)


@pytest.mark.parametrize("beta_max", [0.0, -1.0, 2.5, float("nan")])
def test_no_other_range_of_write_gates(beta_max):
    with pytest.raises(ValueError, match="beta_max must lie above 0"):
        LinearAttention(8, 1, beta_max=beta_max, rngs=nnx.Rngs(0))


def test_the_reference_has_its_own_write_gates():
    config = LizaConfig.tptt_reference()
    with pytest.raises(ValueError, match="use beta_max=1"):
        LinearAttention(8, 1, config=config, beta_max=2.0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("beta_max", [1.0, 2.0])
def test_the_layer_reads_a_row_as_it_reads_single_tokens(beta_max):
    config = LizaConfig(writes="all", num_householder=2, chunk_size=4)
    layer = LinearAttention(16, 2, config=config, beta_max=beta_max, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    extend = quick_jit(lambda *args: layer.extend(*args))
    state, outs = layer.init_state(2), []
    for t in range(x.shape[1]):
        out, state = extend(x[:, t : t + 1], state, jnp.full(2, t))
        outs.append(out)
    whole = quick_jit(lambda x: layer(x))(x)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, atol=2e-5)


VARIANTS = [Variant(1, 2.0, "own"), Variant(3, 2.0, "own"), Variant(2, 1.0, "derivative")]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_the_model_sees_nothing_of_what_comes_later(variant):
    model = Tracker(variant, 6, dim=16, heads=2, rngs=nnx.Rngs(0))
    elements = jnp.arange(12).reshape(2, 6) % 6
    run = quick_jit(lambda elements: model(elements))
    logits = run(elements)
    assert logits.shape == (2, 6, 6)
    changed = run(elements.at[:, 3:].set(5))
    np.testing.assert_allclose(changed[:, :3], logits[:, :3], atol=1e-5)
    assert not np.allclose(changed[:, 3:], logits[:, 3:], atol=1e-3)


# --- trials ----------------------------------------------------------------------------------


# What is left to guess far beyond the training length: all of parity; of S3, with one reflection
# per element, the place within its even or odd half; nothing.
TRIALS = {
    "parity, N = 1, beta up to 1": ("parity", Variant(1, 1.0, "own"), 1 / 2),
    "parity, N = 1, beta up to 2": ("parity", Variant(1, 2.0, "own"), 1),
    "s3, N = 1, beta up to 2": ("s3", Variant(1, 2.0, "own"), 1 / 3),
    "s3, N = 2, beta up to 2": ("s3", Variant(2, 2.0, "own"), 1),
}


@pytest.mark.parametrize(("group", "variant", "expected"), TRIALS.values(), ids=TRIALS)
def test_what_a_layer_can_do_at_four_times_the_length(group, variant, expected):
    accuracy = run_trial(Trial(group, variant, 0), TRAINING)
    assert accuracy.shape == (64,)
    assert accuracy[32:].mean() == pytest.approx(expected, abs=0.05)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def fake_trials(monkeypatch):
    """Trials that say what they were asked and take no time."""
    asked = []

    def run(trial, training):
        asked.append(trial.label)
        return np.linspace(1, 0.5, training.test_length) - trial.seed / 10

    monkeypatch.setattr(state_tracking, "run_trial", run)
    return asked


def test_finished_trials_are_not_run_again(fake_trials, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--groups", "s3", "--seeds", "0", "1", "--json"]
    arguments += ["--length", "8", "--test-length", "32"]
    assert run_configured(track_states, TrackingConfig, arguments) == 0
    first = capsys.readouterr().out
    result = json.loads(first.splitlines()[-1])
    assert fake_trials[:2] == [f"s3, N = 1, beta up to 1, seed {seed}" for seed in (0, 1)]
    assert len(fake_trials) == 8
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert result == json.loads((tmp_path / "results.json").read_text())
    assert len(result["trials"]) == 4
    near, middle, far = result["trials"][0]["accuracy"]
    assert (near["from"], near["to"], far["from"], far["to"]) == (1, 8, 17, 32)
    assert near["standard_error"] == pytest.approx(0.05)
    assert f"{middle['mean']:.3f} ± 0.050" in first

    trials = tmp_path / "trials.jsonl"
    *whole, last = trials.read_text().splitlines(keepends=True)
    trials.write_text("".join(whole) + last[:40])
    fake_trials.clear()
    assert run_configured(track_states, TrackingConfig, [*arguments, "--seeds", "0", "1", "2"]) == 0
    assert fake_trials == [
        *(f"s3, N = 1, beta up to {beta}, seed 2" for beta in (1, 2)),
        "s3, N = 2, beta up to 1, seed 2",
        *(f"s3, N = 2, beta up to 2, seed {seed}" for seed in (1, 2)),
    ]


def test_one_step_needs_no_tricks():
    config = TrackingConfig(beta_range=(2.0,), keys=("own", "derivative"))
    assert [variant.label for variant in config.variants] == [
        "N = 1, beta up to 2",
        "N = 2, beta up to 2",
        "N = 2, beta up to 2, derivative keys",
    ]


def test_spans_double_up_to_the_end():
    assert spans(64, 256) == [(0, 64), (64, 128), (128, 256)]
    assert spans(64, 100) == [(0, 64), (64, 100)]
    assert spans(64, 64) == [(0, 64)]
    (mean,) = accuracies(np.ones((1, 64)), 64).values()
    assert mean == (1.0, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "s9"], "groups"),
        (["--num-householder", "0"], "num_householder must be at least 1"),
        (["--beta-range", "3"], "beta_range must lie above 0"),
        (["--test-length", "32"], "test_length (32) must be at least length (64)"),
        (["--short-length", "65"], "short_length (65) must be at most length (64)"),
        (["--heads", "3"], "dim (64) must be a multiple of heads (3)"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "0"], "learning_rate must be above 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [*arguments, "--output", str(output)]
    assert run_configured(track_states, TrackingConfig, arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert len(stderr.strip().splitlines()) == 1
    assert message in stderr
    assert not output.exists()
