"""The whole model: streaming, packing, memory off, windows, remat, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from tests.contracts import (
    PIECE,
    assert_close,
    assert_trees_close,
    jitted,
    quick_jit,
    random_tokens,
    randomize,
    relative_error,
    verify_streaming_contract,
)
from tests.shapes import GEMMA, LLAMA, STREAMS
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.layers import softmax_attention as softmax_layer
from tptt_jax.model import base_model, init_cache
from tptt_jax.ops.attention import fused_attention
from tptt_jax.ops.documents import count_positions


@pytest.mark.parametrize(("config", "options"), STREAMS.values(), ids=STREAMS)
def test_splits_padding_and_packing_change_nothing(config, options):
    liza = None
    if options is not None:
        # Several chunks per row, and a share at which a wrong memory cannot hide.
        liza = LizaConfig(writes="all", **{"chunk_size": 4, "mag_init": 0.4} | options)
    model = randomize(CausalLM(config, liza, LoraConfig(rank=2), rngs=nnx.Rngs(0)))
    verify_streaming_contract(model, random_tokens((2, 18)))


def _titan(config=LLAMA, *, random=True, dtype=jnp.float32, rank=2, **options):
    liza = LizaConfig(writes="all", **{"chunk_size": 4, "mag_init": 0.4} | options)
    lora = LoraConfig(rank=rank) if rank else None
    model = CausalLM(config, liza, lora, dtype=dtype, rngs=nnx.Rngs(0))
    return randomize(model) if random else model


def test_ids_of_one_document_are_the_same_as_none():
    model, tokens = _titan(softmax_window=4), random_tokens((2, 10))
    graphdef, state = nnx.split(model)
    run = quick_jit(lambda *args: nnx.merge(graphdef, state)(*args[:2], cache=args[2])[::2])
    cache = init_cache(model, 2, 16)
    for length in (PIECE, 1, 1):
        part, tokens = tokens[:, :length], tokens[:, length:]
        want = run(part, None, cache)
        assert_trees_close(run(part, np.full((2, length), 3), cache), want, 1e-6, "with a cache")
        cache = want[1]
    # A row that waits: its one token is padding.
    logits, waited = run(tokens[:, :1], np.array([[0], [1]]), cache)
    want, gone_on = run(tokens[:, :1], None, cache)
    assert_close(logits[1], want[1], 1e-6, "the other row")
    for old, new, both in zip(*map(jax.tree.leaves, (cache, waited, gone_on)), strict=True):
        # Length, hidden and seen have the rows first, caches their layers.
        axis = 0 if old.ndim < 3 else 1
        assert_array_equal(new.take(0, axis), old.take(0, axis))
        assert_close(new.take(1, axis), both.take(1, axis), 1e-6, "the other row's cache")


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_memory_off_is_the_base_model(config):
    titan = _titan(config, random=False)
    base, tokens = base_model(titan), random_tokens((2, 9))
    assert base.liza is base.lora is None
    assert base.embed.embedding.get_value() is titan.embed.embedding.get_value()
    want = jitted(base)(tokens).logits
    assert_close(jitted(titan, use_memory=False)(tokens).logits, want, 1e-6, "memory off")
    assert relative_error(jitted(titan)(tokens).logits, want) > 1e-3


def test_base_model_drops_trained_adapters():
    model = _titan()
    tokens, plain = random_tokens((2, 9)), CausalLM(LLAMA, rngs=nnx.Rngs(5))
    values = dict(nnx.to_flat_state(nnx.state(model)))
    flat = [(path, values[path]) for path, _ in nnx.to_flat_state(nnx.state(plain))]
    nnx.update(plain, nnx.from_flat_state(flat))
    want = jitted(plain)(tokens).logits
    assert_close(jitted(base_model(model))(tokens).logits, want, 1e-7, "base")
    assert relative_error(jitted(model, use_memory=False)(tokens).logits, want) > 1e-2


def _rotate(x, positions, theta):
    """Half-split rotation in float64; x [T, H, D]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** -(np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def _windowed(q, k, v, *, window, sinks, scale, theta=1e4):
    """One document: a mask over all pairs; sinks are seen from window + sinks at most."""
    length, heads, _ = q.shape
    places = np.arange(length)
    groups = heads // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    keys = _rotate(k, places, theta)
    near = np.einsum("thd,shd->hts", _rotate(q, places, theta), keys)
    far = np.einsum("thd,shd->hts", _rotate(q, np.minimum(places, window + sinks), theta), keys)
    query, key = places[:, None], places[None]
    logits = np.where(key < sinks, far, near) * scale
    mask = (key <= query) & ((key > query - window) | (key < sinks))
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v)


def _normed(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize(
    ("window", "sinks", "packed"),
    [(5, 3, False), (5, 3, True), (3, 4, True), (1, 1, True), (4, 0, True)],
    ids=str,
)
def test_windows_with_sinks_equal_a_mask(window, sinks, packed):
    """The softmax branch of the first layer, whose input is known."""
    model = _titan(softmax_window=window, softmax_sinks=sinks)
    tokens = random_tokens((2, 20))
    ids = np.array([[1] * 7 + [2] * 13, [0, 0] + [5] * 17 + [0]]) if packed else None
    branches = jitted(model, return_branches=True)(tokens, ids).branches
    got = np.asarray(branches[0].softmax)[0]
    layer = jax.tree.map(
        lambda x: np.asarray(x[0], np.float64), nnx.to_pure_dict(nnx.state(model.stacks[0]))
    )
    attention = layer["self_attn"]
    x = np.asarray(model.embed.embedding[...], np.float64)[tokens]
    x = _normed(x, layer["attn_norm"]["weight"], LLAMA.norm.eps)

    def heads(name):
        lora = attention[name]["lora"]
        kernel = attention[name]["kernel"] + lora["a"] @ lora["b"] * 8
        return (x @ kernel).reshape(2, 20, -1, LLAMA.head_dim)

    q, k, v = (heads(f"{name}_proj") for name in "qkv")
    for row in range(2):
        for number in [1] if ids is None else set(ids[row]) - {0}:
            mask = np.full(20, True) if ids is None else ids[row] == number
            want = _windowed(
                *(y[row, mask] for y in (q, k, v)),
                window=window, sinks=sinks, scale=LLAMA.head_dim**-0.5,
            )  # fmt: skip
            assert_close(got[row, mask], want, 1e-5, f"row {row}, document {number}")


def test_branches_are_what_the_mixture_is_made_of():
    """A model of one layer, finished by hand from its branches."""
    config = ModelConfig.tiny(num_layers=1)
    model, tokens = _titan(config, rank=0), random_tokens((2, 11))
    ids = np.array([[1] * 4 + [0] + [1] * 6, [0] * 3 + [1] * 3 + [2] * 5])
    output = jitted(model, return_branches=True)(tokens, ids)
    assert len(output.branches) == 1
    soft, linear = (np.asarray(x, np.float64)[0] for x in output.branches[0])
    layer = jax.tree.map(
        lambda x: np.asarray(x[0], np.float64), nnx.to_pure_dict(nnx.state(model.stacks[0]))
    )
    attention, mlp = layer["self_attn"], layer["mlp"]
    mu = 1 / (1 + np.exp(-attention["mag"]["logit"]))[:, None]
    root = {
        name: np.sqrt((x**2).mean(-1, keepdims=True) + guard)
        for name, x, guard in (("soft", soft, 0), ("linear", linear, 1e-6))
    }
    mixed = (1 - mu) * soft + mu * linear * root["soft"] / root["linear"]
    x = np.asarray(model.embed.embedding[...], np.float64)[tokens]
    x = x + mixed.reshape(2, 11, -1) @ attention["o_proj"]["kernel"]
    y = _normed(x, layer["mlp_norm"]["weight"], config.norm.eps)
    gate = y @ mlp["gate_proj"]["kernel"]
    gated = gate / (1 + np.exp(-gate)) * (y @ mlp["up_proj"]["kernel"])
    x = x + gated @ mlp["down_proj"]["kernel"]
    hidden = _normed(x, np.asarray(model.final_norm.weight[...], np.float64), config.norm.eps)
    valid = ids != 0
    assert_close(np.asarray(output.hidden)[valid], hidden[valid], 1e-5, "hidden")
    logits = hidden @ np.asarray(model.embed.embedding[...], np.float64).T
    assert_close(np.asarray(output.logits)[valid], logits[valid], 1e-5, "logits")


def test_branches_do_not_change_the_result():
    model, tokens = _titan(), random_tokens((2, 9))
    want = jitted(model)(tokens)
    got = jitted(model, return_branches=True)(tokens)
    assert want.branches is None
    assert_close(got.logits, want.logits, 1e-6, "logits")
    size = (2, 2, 9, LLAMA.num_heads, LLAMA.head_dim)
    assert got.branches[0].softmax.shape == got.branches[0].linear.shape == size


def test_a_new_scheduled_share_does_not_recompile():
    model = _titan(mag="scheduled", mag_init=0.01, linear_scale="unit")
    graphdef = nnx.graphdef(model)
    run = quick_jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    tokens, outputs = random_tokens((2, 9)), []
    for share in (0.01, 0.3, 0.5):
        model.mag_share[...] = jnp.asarray(share, jnp.float32)
        outputs.append(run(nnx.state(model), tokens))
        assert run._cache_size() == 1
    assert relative_error(outputs[1], outputs[0]) > 1e-2
    assert relative_error(outputs[2], outputs[1]) > 1e-2
    model.mag_share[...] = jnp.zeros((), jnp.float32)
    base = jitted(model, use_memory=False)(tokens).logits
    assert_close(run(nnx.state(model), tokens), base, 1e-6, "share 0")


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_whole_rows_may_be_fused_and_cached_ones_are_not(config, monkeypatch):
    model, tokens = _titan(config), random_tokens((2, 20))
    ids = np.array([[1] * 7 + [2] * 13, [0, 0] + [5] * 17 + [0]])
    want = [jitted(model)(tokens, x).logits for x in (None, ids)]
    calls = []
    graphdef, state = nnx.split(model)

    def fuse(*args, **options):
        calls.append(options["window"])
        return fused_attention(*args, implementation="xla", **options)

    monkeypatch.setattr(softmax_layer, "can_fuse", lambda *_, **__: True)
    monkeypatch.setattr(softmax_layer, "fused_attention", fuse)
    # A function of its own, which is traced again.
    run = quick_jit(lambda ids: nnx.merge(graphdef, state)(tokens, ids).logits)
    got = [run(x) for x in (None, ids)]
    assert_close(got[0], want[0], 1e-5, "one document")
    assert_close(got[1][ids != 0], want[1][ids != 0], 1e-5, "packed")
    assert set(calls) == ({None} if config is LLAMA else {None, config.sliding_window})
    calls.clear()
    cache = init_cache(model, 2, 20)
    jax.eval_shape(lambda: model(tokens, cache=cache).logits)
    assert not calls


def _loss(model, tokens, ids, **options):
    """Mean log-likelihood of the tokens themselves: every position counts."""
    logits = model(tokens, ids, **options).logits
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(ids != 0, chosen, 0))


def _gradients(model, tokens, ids, **options):
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters):
        return _loss(nnx.merge(graphdef, parameters, rest), tokens, ids, **options)

    compiled = quick_jit(jax.value_and_grad(loss)).lower(parameters).compile()
    return compiled(parameters), compiled.memory_analysis().temp_size_in_bytes


def test_remat_gives_the_same_loss_and_gradients_in_less_memory():
    config = dataclasses.replace(LLAMA, num_layers=8, layer_kinds=())
    model, tokens = _titan(config, chunk_size=16), random_tokens((2, 256))
    ids = np.ones_like(tokens)
    (loss, plain), kept = _gradients(model, tokens, ids)
    memory = {}
    for remat in ("dots", "full"):
        (again, rematerialised), memory[remat] = _gradients(model, tokens, ids, remat=remat)
        assert_close(again, loss, 1e-6, "loss")
        # Recomputed values round differently, and eight random layers magnify it.
        assert_trees_close(rematerialised, plain, 1e-3, "gradient of ")
    assert memory["full"] < 0.9 * memory["dots"]
    assert memory["dots"] < 0.9 * kept


def test_remat_is_one_of_three():
    with pytest.raises(ValueError, match="remat must be one of none, dots, full, got True"):
        _titan()(random_tokens((1, 3)), remat=True)


def test_gradients_are_the_same_with_and_without_packing():
    model, tokens = _titan(softmax_window=4, softmax_sinks=2), random_tokens((2, 12))
    packed = np.zeros((2, 24), np.int32)
    ids = np.zeros_like(packed)
    lengths = (12, 7)
    # Both documents in the first row, with padding around; nothing in the second.
    for number, (start, length) in enumerate(zip((1, 15), lengths, strict=True)):
        packed[0, start : start + length] = tokens[number, :length]
        ids[0, start : start + length] = number + 1
    separate = (np.arange(12) < np.array(lengths)[:, None]).astype(np.int32)
    (loss, want), _ = _gradients(model, tokens, separate)
    (packed_loss, got), _ = _gradients(model, packed, ids)
    assert_close(packed_loss, loss, 1e-6, "loss")
    assert_trees_close(got, want, 1e-4, "gradient of ")
    for path, leaf in jax.tree.leaves_with_path(want):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_heads(tied):
    config = dataclasses.replace(LLAMA, tie_embeddings=tied, final_softcap=None if tied else 2.0)
    model = randomize(CausalLM(config, rngs=nnx.Rngs(0)))
    names = [path[0] for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert ("lm_head" in names) is not tied
    output = jitted(model)(random_tokens((2, 5)))
    hidden = np.asarray(output.hidden, np.float64)
    if tied:
        want = hidden @ np.asarray(model.embed.embedding[...]).T
    else:
        want = 2 * np.tanh(hidden @ np.asarray(model.lm_head.kernel[...]) / 2)
    assert_close(output.logits, want, 1e-5, "logits")


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_bfloat16_stays_close_to_float32_and_keeps_a_float32_memory(config):
    low = _titan(config, dtype=jnp.bfloat16)
    tokens = random_tokens((2, 18))
    exact = _titan(config)
    values = dict(nnx.to_flat_state(nnx.state(low)))
    flat = [
        (path, x.replace(values[path].get_value().astype(jnp.float32)))
        for path, x in nnx.to_flat_state(nnx.state(exact))
    ]
    nnx.update(exact, nnx.from_flat_state(flat))
    graphdef, state = nnx.split(low)
    cache = init_cache(low, 2, 18)
    output = quick_jit(lambda x, cache: nnx.merge(graphdef, state)(x, cache=cache))(tokens, cache)
    assert output.logits.dtype == output.hidden.dtype == jnp.bfloat16
    memory = output.cache.stacks[0].memory
    assert memory.state.dtype == jnp.float32
    assert memory.history.keys.dtype == jnp.bfloat16
    assert all(x.keys.dtype == jnp.bfloat16 for x in output.cache.stacks[0].softmax.values())
    want = jitted(exact)(tokens).logits
    assert np.isfinite(np.asarray(output.logits, np.float32)).all()
    error = np.asarray(output.logits, np.float32) - np.asarray(want)
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < 0.05


def test_memory_has_one_state_per_kv_head_whatever_the_context():
    model = _titan(GEMMA, softmax_window=4, softmax_sinks=2)
    short, long = (jax.eval_shape(lambda n=n: init_cache(model, 3, n)) for n in (64, 1_000_000))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), short) == jax.tree.map(
        lambda x: (x.shape, x.dtype), long
    )
    memory = long.stacks[0].memory
    assert memory.state.shape == (5, 3, GEMMA.num_kv_heads, GEMMA.head_dim, GEMMA.head_dim)
    assert long.stacks[0].softmax["full"].keys.shape == (1, 3, 4, 1, 16)
    assert long.stacks[0].softmax["sliding"].keys.shape == (4, 3, 5, 1, 16)
    assert long.stacks[0].softmax["sliding"].sink_keys.size == 0
    without_window = _titan(GEMMA)
    full = jax.eval_shape(lambda: init_cache(without_window, 3, 1000))
    assert full.stacks[0].softmax["full"].keys.shape == (1, 3, 1000, 1, 16)


def test_a_linear_model_has_no_key_value_cache_and_needs_its_memory():
    model = _titan(softmax=False)
    assert init_cache(model, 1, 1_000_000).stacks[0].softmax is None
    assert not any("mag" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
    with pytest.raises(ValueError, match="purely linear model cannot run without its memory"):
        model(jnp.ones((1, 3), jnp.int32), use_memory=False)


def test_a_window_stays_when_the_memory_is_off():
    model, tokens = _titan(softmax_window=3, softmax_sinks=0), random_tokens((2, 12))
    off = jitted(model, use_memory=False)
    changed = tokens.copy()
    changed[:, 0] += 1
    one, other = (np.asarray(off(x).logits) for x in (tokens % 96, changed % 97))
    # Two layers of three tokens each: the first token reaches the fifth, no farther.
    assert np.abs(one - other)[:, 4].max() > 1e-4
    assert_array_equal(one[:, 5:], other[:, 5:])
    reached = np.abs(
        np.asarray(jitted(model)(tokens % 96).logits)
        - np.asarray(jitted(model)(changed % 97).logits)
    )
    assert (reached[:, 5:].max(-1) > 1e-6).all()


def test_positions_may_be_given():
    model, tokens = _titan(), random_tokens((2, 10))
    run = jitted(model, use_memory=False)
    ids = np.array([[1] * 4 + [2] * 6, [0] * 3 + [1] * 7])
    counted = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [9, 9, 9, 0, 1, 2, 3, 4, 5, 6]])
    want = np.asarray(run(tokens, ids, None).logits)
    got = np.asarray(run(tokens, ids, counted).logits)
    assert_close(got[ids != 0], want[ids != 0], 1e-6, "counted by hand")
    # Only distances matter to softmax attention, and they do.
    moved = np.asarray(run(tokens, ids, counted + 1000).logits)
    assert_close(moved[ids != 0], want[ids != 0], 1e-4, "moved")
    stretched = np.asarray(run(tokens, ids, counted * 2).logits)
    assert relative_error(stretched[ids != 0], want[ids != 0]) > 1e-3


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_positions_are_counted_within_documents(runs):
    # Padding at the ends of the row only, as `forward_hidden` arranges it.
    ids = np.concatenate([np.repeat(number, size) for number, size in runs if number] or [[]])
    ids = np.pad(ids[:12], (0, 12 - len(ids[:12]))).astype(np.int32)
    got = np.asarray(positions_of(ids[None]))[0]
    count = 0
    for t in np.flatnonzero(ids):
        count = count + 1 if t and ids[t - 1] == ids[t] else 0
        assert got[t] == count


positions_of = quick_jit(lambda ids: count_positions(ids.shape, ids, None))


def test_dropout_needs_a_key_and_differs_between_layers():
    model, tokens = _titan(dropout=0.5), random_tokens((2, 8))
    graphdef, state = nnx.split(model)

    @quick_jit
    def run(key):
        model = nnx.merge(graphdef, state)
        return model(tokens, dropout_key=key, return_branches=True)

    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_array_equal(one.logits, again.logits)
    assert relative_error(other.logits, one.logits) > 1e-3
    dropped = np.asarray(one.branches[0].linear) == 0
    assert 0.4 < dropped.mean() < 0.6
    assert (dropped[0] != dropped[1]).any()


def _one_layer(liza=None, **options):
    return CausalLM(ModelConfig.tiny(num_layers=1), liza, rngs=nnx.Rngs(0), **options)


def _behind_window(window=8, **changes):
    return LizaConfig(softmax_window=window, **changes)


@pytest.mark.parametrize(
    ("liza", "options", "message"),
    [
        (_behind_window(16), {}, "window: 8 in the state, 16 in the model"),
        (_behind_window(None), {}, "window: 8 in the state, none in the model"),
        (None, {}, "window: 8 in the state, none in the model"),
        (_behind_window(softmax_sinks=2), {}, "softmax_sinks: 4 in the state, 2 in the model"),
        (_behind_window(), {"dtype": jnp.bfloat16}, "dtype: float32 in the state, bfloat16 in the"),
        (_behind_window(writes="all"), {}, "writes: evicted in the state, all in the model"),
    ],
)
def test_a_state_of_another_model_is_refused(liza, options, message):
    other, tokens = _one_layer(liza, **options), jnp.ones((1, 1), jnp.int32)
    # What a state was made for outlives transformations, which leave it static.
    state = jax.tree.map(
        jnp.copy, jax.jit(lambda x: x)(init_cache(_one_layer(_behind_window()), 1))
    )
    for call in (other, lambda *args, **kw: jax.eval_shape(lambda: other(*args, **kw).cache)):
        with pytest.raises(ValueError, match=message) as error:
            call(tokens, cache=state)
        assert "\n" not in str(error.value)


def test_a_full_cache_of_as_many_slots_as_a_window_is_not_misread():
    """Shapes alone do not tell them apart."""
    state = init_cache(_one_layer(), 1, 16)
    liza = _behind_window(16, softmax_sinks=0, writes="none")
    with pytest.raises(ValueError, match="window: none in the state, 16 in the model"):
        _one_layer(liza)(jnp.ones((1, 1), jnp.int32), cache=state)


def test_rows_and_memory_of_a_state_are_those_of_the_call():
    model, tokens = _one_layer(_behind_window()), jnp.ones((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="the state has 1 rows, the prompts have 2: fork_state"):
        model(tokens, cache=init_cache(model, 1))
    without = init_cache(model, 2, use_memory=False)
    with pytest.raises(ValueError, match="without the memory: continue with use_memory=False"):
        model(tokens, cache=without)
    after = jax.eval_shape(lambda: model(tokens, cache=without, use_memory=False).cache)
    assert jax.tree.structure(after) == jax.tree.structure(without)
