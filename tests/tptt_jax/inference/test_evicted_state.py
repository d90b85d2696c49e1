"""Reading, generating, saving and scoring with a memory of evicted tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import (
    assert_close,
    assert_trees_close,
    quick_jit,
    raise_shares,
    random_tokens,
    randomize,
    relative_error,
)
from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate, init_cache
from tptt_jax.inference import prefill
from tptt_jax.inference.prefill import read
from tptt_jax.inference.score import token_losses
from tptt_jax.inference.snapshot import load_state, save_state
from tptt_jax.inference.state import fork_state, state_bytes
from tptt_jax.inference.unstack import unstack_layers

TINY = ModelConfig.tiny(num_layers=2, mlp_dim=16)
MIXED = ModelConfig.tiny(
    num_layers=4, mlp_dim=16, layer_kinds=("sliding", "full", "sliding", "full"), sliding_window=5
)
CONFIGS = {"full": TINY, "sliding and full": MIXED}
LIZA = LizaConfig(softmax_window=7, softmax_sinks=2, memory_rank=2)
KEPT = dataclasses.replace(LIZA, full_layers=(0,), horizon=9)
TOKENS = random_tokens((2, 40))


def make(config=TINY, liza=LIZA, dtype=jnp.float32):
    return raise_shares(randomize(CausalLM(config, liza, dtype=dtype, rngs=nnx.Rngs(0))))


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


def whole_rows(model, use_memory=True):
    graphdef, state = nnx.split(model)
    run = quick_jit(lambda state, tokens: nnx.merge(graphdef, state)(
        tokens, use_memory=use_memory).logits)  # fmt: skip
    return lambda tokens: np.asarray(run(state, tokens))


def test_greedy_tokens_are_the_argmax_of_whole_rows(config):
    model = make(config)
    got = np.asarray(generate(model, TOKENS, 20).tokens)
    text = np.concatenate([TOKENS, got], axis=1)
    logits = whole_rows(model)(text)
    assert np.array_equal(logits[:, 39:-1].argmax(-1), got)
    # Without the memory other tokens come.
    off = whole_rows(model, use_memory=False)(text)
    assert relative_error(off, logits) > 0.1
    assert not np.array_equal(generate(model, TOKENS, 20, use_memory=False).tokens, got)


def test_reading_on_and_generating_on_is_reading_at_once(config):
    model = make(config)
    want = generate(model, TOKENS, 12)
    state = read(model, TOKENS[:, 25:], state=read(model, TOKENS[:, :25]))
    first = generate(model, TOKENS[:, :0], 5, state=state)
    rest = generate(model, TOKENS[:, :0], 7, state=first.state)
    assert np.array_equal(np.concatenate([first.tokens, rest.tokens], 1), want.tokens)
    assert_trees_close(rest.state, want.state, 1e-5, "state")
    assert rest.state.length.tolist() == [52, 52]


def test_rows_of_different_lengths_get_what_they_get_alone(config):
    model = make(config)
    segments = np.ones(TOKENS.shape, np.int32)
    # One row fits the window; the other has lost tokens, and padding inside.
    segments[0, 5:] = 0
    segments[1, 9:12] = segments[1, -2:] = 0
    together = generate(model, TOKENS, 8, segment_ids=segments)
    assert together.state.length.tolist() == [13, 43]
    for row in range(2):
        alone = generate(model, TOKENS[row : row + 1, segments[row] != 0], 8)
        assert np.array_equal(together.tokens[row], alone.tokens[0])
        mine = jax.tree.map(lambda x, row=row: x[:, row], together.state.stacks)
        other = jax.tree.map(lambda x: x[:, 0], alone.state.stacks)
        assert_trees_close(mine, other, 1e-5, f"row {row}")


def test_segments_shorter_than_the_window_and_longer(monkeypatch):
    model = make(MIXED)
    want = read(model, TOKENS)
    for name, size in (("SEGMENT_TOKENS", 12), ("TAIL_TOKENS", 3), ("CALL_TOKENS", 24)):
        monkeypatch.setattr(prefill, name, size)
    assert_trees_close(read(model, TOKENS), want, 1e-5, "state")


def test_unstacked_layers_compute_the_same(config, monkeypatch):
    monkeypatch.setattr("tptt_jax.inference.unstack._WORTHWHILE_BYTES", 0)
    model = make(config)
    apart = unstack_layers(model)
    has = [layer.self_attn.memory is not None for layer in apart.stacks[0].layers]
    assert has == [layer.self_attn.mag is not None for layer in apart.stacks[0].layers]
    assert has == [kind == "full" for kind in config.layer_kinds]
    want, got = generate(model, TOKENS, 10), generate(apart, TOKENS, 10)
    assert np.array_equal(got.tokens, want.tokens)
    assert_trees_close(got.state, want.state, 1e-5, "state")


def test_a_hybrid_goes_on_from_any_state_and_grows_with_the_text(tmp_path, monkeypatch):
    """Kept layers hold every token: beyond their first 512 slots, in files, and unstacked."""
    model, text = make(TINY, KEPT), random_tokens((2, 520), seed=4)
    segments = np.ones(text.shape, np.int32)
    segments[0, 500:] = segments[1, 9:12] = 0
    want = generate(model, text, 12, segment_ids=segments)
    slots = {kind: x.keys.shape[2] for kind, x in want.state.stacks[0].softmax.items()}
    assert slots == {"full": 7, "kept": 1024}
    # The longer row has no padding at its end, where the last tokens stand.
    row = np.concatenate([text[1, segments[1] != 0], want.tokens[1]])
    logits = whole_rows(model)(row[None])[0, 516:-1]
    assert np.array_equal(logits.argmax(-1), want.tokens[1])
    first = read(model, text[:, :30], segments[:, :30])
    assert first.stacks[0].softmax["kept"].keys.shape[2] == 512
    save_state(tmp_path / "first.state", model, first)
    monkeypatch.setattr("tptt_jax.inference.unstack._WORTHWHILE_BYTES", 0)
    apart = unstack_layers(model)
    assert [layer.self_attn.memory is not None for layer in apart.stacks[0].layers] == [False, True]
    loaded = load_state(tmp_path / "first.state", model)
    rest = read(model, text[:, 30:], segments[:, 30:], state=loaded)
    got = generate(apart, text[:, :0], 12, state=rest)
    assert np.array_equal(got.tokens, want.tokens)
    assert_trees_close(got.state, want.state, 1e-5, "state")
    sizes = [state_bytes(TINY, KEPT, batch_size=2, max_tokens=n) for n in (1, 532, 2048)]
    assert sizes[1] == want.state.num_bytes
    # Keys and values of one layer, not of both.
    per_token = 2 * 2 * TINY.num_kv_heads * TINY.head_dim * 4
    assert [sizes[1] - sizes[0], sizes[2] - sizes[0]] == [512 * per_token, 1536 * per_token]
    with pytest.raises(ValueError, match=r"full_layers: \[0\] in the state, \[1\] in the model"):
        load_state(tmp_path / "first.state", make(TINY, dataclasses.replace(KEPT, full_layers=[1])))


def test_forked_rows_go_their_own_way():
    model, questions = make(), random_tokens((2, 5), seed=3)
    document = read(model, TOKENS[:1])
    before = jax.tree.map(np.array, document)
    answers = generate(model, questions, 6, state=fork_state(document, 2)).tokens
    for row in range(2):
        alone = generate(model, np.append(TOKENS[:1], questions[row : row + 1], 1), 6).tokens
        assert np.array_equal(answers[row], alone[0])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, document))


def test_bytes_are_known_and_do_not_grow(config):
    state = read(make(config), TOKENS)
    sizes = [state_bytes(config, LIZA, batch_size=2, max_tokens=n) for n in (1, 40, 10**8)]
    assert sizes == [state.num_bytes] * 3
    # Full layers: the ring, the sinks, one state per KV head in float32 and no raw tokens.
    full, heads, dim = config.layer_kinds.count("full"), config.num_kv_heads, config.head_dim
    slots = full * (7 + 2) + (len(config.layer_kinds) - full) * 5
    cache = 4 * (2 * slots * heads * dim + full * heads * dim * dim + 1)
    rest = 4 * config.embed_dim + config.vocab_size
    assert state.num_bytes == 2 * (cache + rest)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_loaded_state_goes_on_as_the_saved_one(config, dtype, tmp_path):
    model, path = make(config, dtype=dtype), tmp_path / "document.state"
    state = read(model, TOKENS)
    save_state(path, model, state)
    loaded = load_state(path, make(config, dtype=dtype))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    want = generate(model, TOKENS, 6).tokens
    assert np.array_equal(generate(model, TOKENS[:, :0], 6, state=loaded).tokens, want)


@pytest.mark.parametrize(
    "change",
    [
        {"writes": "none"},
        {"memory_rank": 3},
        {"operator": "delta_rule", "alpha_gate": "constant"},
        {"mag": "learned"},
    ],
    ids=lambda x: ", ".join(x),
)
def test_another_memory_is_refused(change, tmp_path):
    model, path = make(), tmp_path / "document.state"
    save_state(path, model, read(model, TOKENS))
    with pytest.raises(ValueError, match="another model has read it"):
        load_state(path, make(liza=dataclasses.replace(LIZA, **change)))
    # One number of the share is enough.
    model.stacks[0].self_attn.mag.bias[...] += 1e-3
    with pytest.raises(ValueError, match="another model has read it"):
        load_state(path, model)


def test_the_memory_stays_on_or_off(tmp_path):
    model = make()
    with_memory, without = (read(model, TOKENS, use_memory=use) for use in (True, False))
    assert with_memory.has_memory
    assert not without.has_memory
    with pytest.raises(ValueError, match="use_memory=False"):
        read(model, TOKENS, state=without)
    with pytest.raises(ValueError, match="use_memory=True"):
        generate(model, TOKENS, state=with_memory, use_memory=False)
    save_state(tmp_path / "plain.state", model, without)
    loaded = load_state(tmp_path / "plain.state", model)
    with pytest.raises(ValueError, match="use_memory=False"):
        generate(model, TOKENS, state=loaded)
    want = generate(model, TOKENS, 6, use_memory=False).tokens
    assert np.array_equal(
        generate(model, TOKENS[:, :0], 6, state=loaded, use_memory=False).tokens, want
    )


IDLE = {"no window": (TINY, LizaConfig(memory_rank=2)), "all layers slide": (
    dataclasses.replace(TINY, layer_kinds=("sliding",) * 2, sliding_window=5), LIZA)}  # fmt: skip


@pytest.mark.parametrize(("config", "liza"), IDLE.values(), ids=IDLE)
def test_a_memory_that_never_holds_anything_is_in_no_state(config, liza, tmp_path):
    model = make(config, liza)
    state = init_cache(model, 2, growable=True)
    assert not state.has_memory
    assert state_bytes(config, liza) == state_bytes(config)
    result = generate(model, TOKENS, 6)
    assert np.array_equal(result.tokens, generate(model, TOKENS, 6, use_memory=False).tokens)
    save_state(tmp_path / "idle.state", model, result.state)
    assert not load_state(tmp_path / "idle.state", model).has_memory
    # There is nothing to leave out: the state may go on either way.
    read(model, TOKENS, state=read(model, TOKENS, use_memory=False))


def test_scores_are_those_of_whole_rows():
    model, text = make(), TOKENS[0]
    got = np.concatenate(list(token_losses(model, np.array_split(text, 3))))
    logits = whole_rows(model)(text[None])[0].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert_close(got, -logs[np.arange(39), text[1:]], 1e-5, "losses")
    off = np.concatenate(list(token_losses(model, [text], use_memory=False)))
    assert relative_error(off, got) > 1e-2


@pytest.mark.slow
def test_no_drift_after_ten_thousand_tokens():
    model = make(liza=dataclasses.replace(LIZA, softmax_window=16))
    prompt = random_tokens((1, 100))
    decoded = generate(model, prompt, 10_000, temperature=1.0, stop_tokens=())
    assert decoded.state.length.tolist() == [10_100]
    fresh = read(model, np.concatenate([prompt, decoded.tokens], axis=1))
    assert_trees_close(decoded.state, fresh, 1e-4, "state")
