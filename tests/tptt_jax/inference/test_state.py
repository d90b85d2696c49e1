"""States: size, growth, forks, continued reading."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.contracts import assert_close, assert_trees_close, random_tokens, randomize
from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate, init_cache
from tptt_jax.inference import prefill
from tptt_jax.inference.prefill import read
from tptt_jax.inference.state import fork_state, state_bytes
from tptt_jax.inference.unstack import unstack_layers
from tptt_jax.layers import softmax_attention

TINY = ModelConfig.tiny(num_layers=2, mlp_dim=16)
SLIDING = dataclasses.replace(TINY, layer_kinds=("sliding", "full"), sliding_window=600)
CONFIGS = {
    "base": (TINY, None),
    "window": (TINY, LizaConfig(writes="all", softmax_window=7, mag_init=0.5)),
    "sliding and full": (SLIDING, LizaConfig(writes="all", mag_init=0.5)),
    "no softmax": (TINY, LizaConfig(writes="all", softmax=False)),
}
TOKENS = random_tokens((2, 40))


def make(config, liza):
    return randomize(CausalLM(config, liza, rngs=nnx.Rngs(0)))


# The other two keep as much of 700 tokens as of 40.
READ = [(name, 40) for name in CONFIGS] + [("base", 700), ("sliding and full", 700)]


@pytest.mark.parametrize(("name", "tokens"), READ)
def test_bytes_are_known_before_anything_is_read(name, tokens):
    config, liza = CONFIGS[name]
    state = read(make(config, liza), random_tokens((2, tokens)))
    assert state.num_bytes == state_bytes(config, liza, batch_size=2, max_tokens=tokens)


def test_only_caches_without_a_window_grow():
    sizes = [
        [state_bytes(*config, max_tokens=tokens) for tokens in (100, 100_000, 10_000_000)]
        for config in CONFIGS.values()
    ]
    (base, window, mixed, linear) = sizes
    assert window[0] == window[1] == window[2]
    assert linear[0] == linear[1] == linear[2]
    assert base[0] < base[1] < base[2]
    # The sliding layer stops at its window; the full one has half the layers of `base`.
    assert mixed[2] - mixed[1] == (base[2] - base[1]) // 2


def test_slots_are_those_of_the_window_or_as_many_as_asked_for():
    for name, want in (("window", {"full": 7}), ("sliding and full", {"sliding": 600, "full": 1})):
        model = make(*CONFIGS[name])
        for growable in (False, True):
            (stack,) = init_cache(model, 1, 1, growable=growable).stacks
            slots = {kind: ring.keys.shape[2] for kind, ring in stack.softmax.items()}
            # Room that grows starts with 512 tokens; windows are as wide as ever.
            assert slots == {kind: 512 if growable and n == 1 else n for kind, n in want.items()}


def test_a_linear_model_keeps_states_and_raw_tokens_only():
    cache = init_cache(make(*CONFIGS["no softmax"]), 1, 1000)
    kinds = {leaf.shape[2:] for leaf in jax.tree.leaves(cache.stacks)}
    assert kinds == {(2, 16, 16), (2, 2, 16)}


@pytest.mark.parametrize(("config", "liza"), CONFIGS.values(), ids=CONFIGS)
def test_reading_on_and_generating_on_is_reading_at_once(config, liza):
    model = make(config, liza)
    want = generate(model, TOKENS, 12)
    state = read(model, TOKENS[:, 25:], state=read(model, TOKENS[:, :25]))
    first = generate(model, TOKENS[:, :0], 5, state=state)
    rest = generate(model, TOKENS[:, :0], 7, state=first.state)
    again = generate(model, TOKENS[:, :0], 12, state=state)
    assert np.array_equal(np.concatenate([first.tokens, rest.tokens], 1), want.tokens)
    assert np.array_equal(again.tokens, want.tokens)
    assert_trees_close(rest.state, want.state, 1e-5, "state")
    assert rest.state.length.tolist() == [52, 52]


def test_calls_of_the_model_advance_the_same_state():
    """Read with the model's own call, and with padding anywhere, then generated from."""
    model = make(*CONFIGS["window"])
    graphdef, weights = nnx.split(model)
    call = jax.jit(lambda x, ids, state: nnx.merge(graphdef, weights)(x, ids, cache=state).cache)
    padded, ids = np.full((2, 45), 3, np.int32), np.zeros((2, 45), np.int32)
    for row, places in enumerate((np.arange(5, 45), np.r_[0:20, 25:45])):
        padded[row, places], ids[row, places] = TOKENS[row], 1
    state = call(padded, ids, init_cache(model, 2))
    assert_trees_close(state, read(model, TOKENS), 1e-5, "state")


def test_caches_grow_while_decoding_and_change_nothing():
    model = make(*CONFIGS["sliding and full"])
    prompt = random_tokens((1, 500))
    # More than the sliding window holds.
    short = generate(model, prompt, 120, stop_tokens=())
    assert short.state.stacks[0].softmax["full"].keys.shape[2] == 1024
    assert short.state.stacks[0].softmax["sliding"].keys.shape[2] == 600
    small = read(model, prompt)
    assert small.stacks[0].softmax["full"].keys.shape[2] == 512
    # A ring has its whole window from the start: it never grows.
    assert small.stacks[0].softmax["sliding"].keys.shape[2] == 600
    grown = generate(model, prompt[:, :0], 120, stop_tokens=(), state=small)
    assert grown.state.stacks[0].softmax["full"].keys.shape[2] == 1024
    assert np.array_equal(grown.tokens, short.tokens)
    text = np.concatenate([prompt, grown.tokens], axis=1)
    assert_close(grown.state.hidden, read(model, text).hidden, 1e-4, "hidden")


def test_forked_rows_go_their_own_way():
    model = make(*CONFIGS["window"])
    questions = random_tokens((2, 5), seed=3)
    document = read(model, TOKENS[:1])
    before = jax.tree.map(np.array, document)
    answers = generate(model, questions, 6, state=fork_state(document, 2)).tokens
    for row in range(2):
        alone = generate(model, np.append(TOKENS[:1], questions[row : row + 1], 1), 6).tokens
        assert np.array_equal(answers[row], alone[0])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, document))


def test_what_reading_starts_from_is_written_in_place():
    model = make(*CONFIGS["window"])
    state = init_cache(model, 2, growable=True)
    prefill.extend_state(model, prefill.align_prompts(TOKENS, None), state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.stacks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": TOKENS[:1]}, r"fork_state"),
        ({"use_memory": False}, r"with the memory"),
        ({"segment_ids": np.ones((2, 3))}, r"segment_ids must have shape"),
        ({"tokens": TOKENS[0]}, r"\[B, T\]"),
    ],
    ids=["rows", "memory", "ids", "one row"],
)
def test_a_state_that_does_not_fit_is_refused(options, message):
    model = make(*CONFIGS["window"])
    arguments = {"tokens": TOKENS, "state": init_cache(model, 2, growable=True)} | options
    with pytest.raises(ValueError, match=message):
        read(model, **arguments)


def test_a_state_of_another_shape_is_refused():
    other = CausalLM(ModelConfig.tiny(embed_dim=16), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"hidden: float32\[2, 16\] in the state, float32\[2, 32\] in the model"
    ):
        read(make(*CONFIGS["base"]), TOKENS, state=init_cache(other, 2, growable=True))


def test_learned_positions_end():
    config = dataclasses.replace(TINY, position_embedding="learned", max_positions=48)
    model = CausalLM(config, rngs=nnx.Rngs(0))
    assert generate(model, TOKENS, 8).tokens.shape == (2, 8)
    with pytest.raises(ValueError, match="48 positions"):
        generate(model, TOKENS, 9)
    with pytest.raises(ValueError, match="48 positions"):
        read(model, TOKENS, state=read(model, TOKENS))


@pytest.mark.parametrize(("config", "liza"), CONFIGS.values(), ids=CONFIGS)
def test_unstacked_layers_compute_the_same(config, liza, monkeypatch):
    monkeypatch.setattr("tptt_jax.inference.unstack._WORTHWHILE_BYTES", 0)
    model = make(config, liza)
    apart = unstack_layers(model)
    assert apart is not model
    assert isinstance(apart.stacks[0].layers, nnx.List)
    want, got = generate(model, TOKENS, 10), generate(apart, TOKENS, 10)
    assert np.array_equal(got.tokens, want.tokens)
    assert_trees_close(got.state, want.state, 1e-5, "state")


def test_few_logits_at_a_time_change_nothing(monkeypatch):
    model = make(*CONFIGS["window"])
    want = read(model, TOKENS)
    cut, pieces, read_segments = softmax_attention._cut, [], prefill._read
    monkeypatch.setattr(softmax_attention, "_LOGITS_AT_A_TIME", 4000)
    monkeypatch.setattr(softmax_attention, "_cut", lambda *args: (pieces.append(1), cut(*args))[1])
    # Another function, so that it is traced again.
    traced = jax.jit(lambda *args: read_segments.__wrapped__(*args), static_argnums=(0, 1))
    monkeypatch.setattr(prefill, "_read", traced)
    assert_trees_close(read(model, TOKENS), want, 1e-5, "state")
    assert pieces


@pytest.mark.slow
def test_no_drift_after_ten_thousand_tokens():
    config, liza = CONFIGS["window"]
    model = CausalLM(config, liza, rngs=nnx.Rngs(0))
    prompt = random_tokens((1, 100))
    decoded = generate(model, prompt, 10_000, temperature=1.0, stop_tokens=())
    assert decoded.state.length.tolist() == [10_100]
    fresh = read(model, np.concatenate([prompt, decoded.tokens], axis=1))
    assert_trees_close(decoded.state, fresh, 1e-4, "state")
