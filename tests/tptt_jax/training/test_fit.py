"""Fitting every layer's memory to the base model's own attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import (
    assert_close,
    quick_jit,
    raise_shares,
    random_tokens,
    randomize,
)
from tests.tptt_jax.evicted_oracle import run_layer, weights_of
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import AttentionConfig, LayerSizes, NormConfig, layer_kinds, memory_layers
from tptt_jax.decoder import is_memory, memory_location
from tptt_jax.layers.liza import LayerTokens
from tptt_jax.layers.parameters import MemoryParam
from tptt_jax.layers.softmax_attention import token_context
from tptt_jax.model import base_model, replace_memory
from tptt_jax.ops.documents import count_positions
from tptt_jax.training.fit import gap_gradients, make_fit_optimizer, make_fit_step
from tptt_jax.training.layer_gaps import layer_gaps
from tptt_jax.training.partition import load_trainable, split_trainable
from tptt_jax.training.train_step import init_train_state

WINDOW = 6
LLAMA = ModelConfig.tiny(num_layers=2, mlp_dim=16)
MIXED = ModelConfig.tiny(
    num_layers=3,
    mlp_dim=16,
    attention=AttentionConfig(qk_norm="head", out_bias=True),
    layer_kinds=("full", "sliding", "full"),
    sliding_window=4,
)
KEPT = dataclasses.replace(MIXED, num_layers=4, layer_kinds=("full", "sliding", "full", "full"))
# Two stacks.
UNEVEN = ModelConfig.tiny(
    num_layers=2, mlp_dim=16, per_layer=LayerSizes(num_heads=(2, 4), num_kv_heads=(1, 2))
)
MEMORY_NAMES = {
    *(f"mag.{name}" for name in ("weight", "slope", "bias", "limit")),
    *(f"memory.gates.{gate}.{name}" for gate in ("beta", "keep") for name in ("kernel", "bias")),
    *(f"memory.{x}_delta.{name}" for x in "qkv" for name in "ab"),
    *(f"memory.scale.{name}" for name in ("weight", "bias")),
}
TOKENS = random_tokens((2, 24))
PACKED = np.array([[1] * 9 + [2] * 15, [0] * 2 + [7] * 20 + [0] * 2])


def _titan(config=LLAMA, *, random=True, lora=None, dtype=jnp.float32, **options):
    defaults = {"softmax_window": WINDOW, "softmax_sinks": 2, "chunk_size": 8, "memory_rank": 4}
    model = CausalLM(config, LizaConfig(**defaults | options), lora, dtype=dtype, rngs=nnx.Rngs(0))
    return raise_shares(randomize(model)) if random else model


@functools.partial(quick_jit, static_argnums=0)
def _gaps_of(graphdef, state, *args):
    return gap_gradients(nnx.merge(graphdef, state), *args)


def _gaps(model, *args):
    return _gaps_of(*nnx.split(model), *args)


@pytest.mark.parametrize("config", [MIXED, UNEVEN], ids=["sliding and full", "two stacks"])
def test_what_is_fitted_is_the_memory_and_nothing_else(config):
    model = _titan(config, lora=LoraConfig(rank=2))
    _, trainable, share = split_trainable(model, "memory")
    layers = {"stacks.0": [0, 2]} if config is MIXED else {"stacks.0": [0], "stacks.1": [1]}
    assert set(trainable) == {f"{x}.self_attn.{name}" for x in layers for name in MEMORY_NAMES}
    for name, value in trainable.items():
        assert value.dtype == jnp.float32
        assert len(value) == len(layers[".".join(name.split(".")[:2])])
    assert share is None
    assert set(split_trainable(model, "lora")[1]) == set(trainable) | {
        f"{x}.self_attn.{p}_proj.lora.{y}" for x in layers for p in "qkvo" for y in "ab"
    }


@pytest.mark.parametrize(
    "liza", [None, LizaConfig(writes="none", softmax_window=4)], ids=["base model", "window"]
)
def test_without_a_memory_there_is_nothing_to_fit(liza):
    model = CausalLM(LLAMA, liza, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing to train"):
        split_trainable(model, "memory")


def _layers(model):
    """Every layer as a module of its own, the memory's parameters where there are any."""
    return [layer for stack in model.stacks for layer in stack.unroll().layers]


def _plain_gaps(model, tokens, ids):
    """Errors of whole attention layers, called as a model calls them, one layer at a time."""
    positions = count_positions(tokens.shape, ids, None)

    def run(attention, kind, x, **options):
        context = token_context(model.config, attention.liza, kind, positions, ids, None)
        return attention(x, LayerTokens({kind: context}, (kind,)), **options).out

    def error(of_memory, split, kind, x, full):
        attention = nnx.merge(split[0], of_memory, split[1])
        return jnp.sum((run(attention, kind, x) - full) ** 2)

    x, gaps, titans = model.embed(tokens, positions), [], _layers(model)
    for layer, titan, kind in zip(
        _layers(base_model(model)), titans, layer_kinds(model.config, model.liza), strict=True
    ):
        normed = layer.attn_norm(x)
        full = run(layer.self_attn, kind, normed)
        if model.liza.has_memory(kind):
            graphdef, of_memory, others = nnx.split(titan.self_attn, MemoryParam, ...)
            of_layer = ((graphdef, others), kind, normed, full)
            found = jax.value_and_grad(error)(of_memory, *of_layer)
            window = run(titan.self_attn, kind, normed, use_memory=False)
            gap = jnp.sum((window - full) ** 2)
            gaps.append(jax.tree.map(lambda y, gap=gap: y / gap, found))
        x = layer.add(x, full)
    return gaps


GAPS = {
    "sliding and full": (MIXED, {}, None, None),
    "packed": (MIXED, {}, PACKED, None),
    "kept, sliding and full": (KEPT, {"full_layers": (2,)}, None, None),
    "traced window, packed": (LLAMA, {}, PACKED, 4),
    "two stacks, learned share": (UNEVEN, {"mag": "learned", "linear_scale": "match"}, None, None),
}


@pytest.mark.parametrize(("config", "options", "ids", "window"), GAPS.values(), ids=GAPS)
def test_gaps_and_gradients_are_those_of_whole_layers(config, options, ids, window):
    model = _titan(config, **options)
    traced = None if window is None else jnp.asarray(window)
    left, gradients = _gaps(model, TOKENS, ids, traced)
    # The same weights in a model that has the narrower window from the start; padding at the end.
    static = _titan(config, **options | ({} if window is None else {"softmax_window": window}))
    tokens = TOKENS
    if ids is not None:
        order = np.argsort(ids == 0, axis=1, kind="stable")
        tokens, ids = (np.take_along_axis(x, order, axis=1) for x in (TOKENS, ids))
    graphdef, state = nnx.split(static)
    want = quick_jit(lambda state: _plain_gaps(nnx.merge(graphdef, state), tokens, ids))(state)
    assert_close(left, [value for value, _ in want], 1e-5, "gap left")
    assert len(np.unique(left)) == len(left) == 2
    seen = set()
    for layer, (_, of_layer) in zip(memory_layers(config, model.liza), want, strict=True):
        number, index = memory_location(config, model.liza, layer)
        for path, variable in nnx.to_flat_state(of_layer):
            name = ".".join(map(str, ("stacks", number, "self_attn", *path)))
            seen.add(name)
            # What a gate has seen is not trained.
            assert np.asarray(variable.get_value()).any() is np.bool_(path[-1] != "limit"), name
            assert_close(gradients[name][index], variable.get_value(), 1e-4, f"gradient of {name}")
    assert seen == set(gradients) == set(split_trainable(model, "memory")[1])


def _relative_errors(model, tokens, ids):
    """Of each layer, from whole attention layers: [L], 0 where there is no window."""
    positions, liza = count_positions(tokens.shape, ids, None), model.liza
    x, errors = model.embed(tokens, positions), []
    titans, plain = _layers(model), _layers(base_model(model))
    counts = (ids != 0) & (positions >= liza.softmax_window + liza.softmax_sinks)
    for layer, titan, kind in zip(plain, titans, model.config.layer_kinds, strict=True):

        def added(layer, kind=kind, x=x, **options):
            attention = layer.self_attn
            context = token_context(model.config, attention.liza, kind, positions, ids, None)
            here = LayerTokens({kind: context}, (kind,))
            out = attention(layer.attn_norm(x), here, **options).out
            return layer.attn_post_norm(out)

        full = added(layer)
        error = jnp.sum((added(titan, use_memory=False) - full) ** 2, -1) / jnp.sum(x**2, -1)
        errors.append(jnp.sqrt(jnp.sum(jnp.where(counts, error, 0)) / jnp.sum(counts)))
        x = x + full
        x = x + layer.mlp_post_norm(layer.mlp(layer.mlp_norm(x)))
    return jnp.stack(errors)


def test_layer_gaps_are_errors_of_what_layers_add_to_the_residual_stream():
    config = dataclasses.replace(MIXED, norm=NormConfig(placement="both"))
    model = _titan(config, writes="none", memory_rank=0)
    got = layer_gaps(model, [(TOKENS[:1], PACKED[:1]), (TOKENS[1:], PACKED[1:])])
    ids = np.array([PACKED[0], [7] * 20 + [0] * 4])
    tokens = np.stack([TOKENS[0], np.roll(TOKENS[1], -2)])
    graphdef, state = nnx.split(model)
    want = quick_jit(lambda state: _relative_errors(nnx.merge(graphdef, state), tokens, ids))(state)
    assert list(got) == [0, 2]
    assert_close(list(got.values()), want[np.array([0, 2])], 1e-5, "relative errors")
    assert want[1] == 0
    model = replace_memory(model, dataclasses.replace(model.liza, full_layers=(0,)))
    assert layer_gaps(model, [(TOKENS, PACKED)]).keys() == {2}
    with pytest.raises(ValueError, match="no token leaves the window"):
        layer_gaps(model, [(TOKENS[:, :8], None)])


def test_gaps_are_those_of_the_formulas():
    """The first layer, whose input is known, in float64."""
    model = _titan()
    left, _ = _gaps(model, TOKENS)
    layer, plain = _layers(model)[0], _layers(base_model(model))[0]
    weights = weights_of(layer.self_attn)
    x = np.asarray(plain.attn_norm(model.embed(TOKENS, None)), np.float64)
    mine = gap = 0
    for row in x:
        got = run_layer(weights, LLAMA, model.liza, row)
        # A window as long as the row loses nothing.
        whole = LizaConfig(softmax_window=24, softmax_sinks=0, memory_rank=4)
        full = run_layer(weights, LLAMA, whole, row)
        windowed = got.softmax.reshape(len(row), -1) @ weights["o_proj"]["kernel"]
        mine += ((got.out - full.out) ** 2).sum()
        gap += ((windowed - full.out) ** 2).sum()
    assert_close(left[0], mine / gap, 1e-4, "gap left")


def test_a_memory_without_a_share_leaves_the_whole_gap():
    model = _titan()
    model.stacks[0].self_attn.mag.bias[...] = jnp.full((2, LLAMA.num_heads), -1e9)
    left, gradients = _gaps(model, TOKENS)
    np.testing.assert_array_equal(left, [1, 1])
    assert not any(np.asarray(value).any() for value in gradients.values())


def test_rows_that_fit_the_window_leave_no_gap():
    left, gradients = _gaps(_titan(), TOKENS[:, :WINDOW])
    assert np.abs(left).max() < 1e-2
    assert all(np.isfinite(value).all() for value in gradients.values())


def _fit(model, steps, *, windows=(None,)):
    partition, trainable, share = split_trainable(model, "memory")
    optimizer = make_fit_optimizer(2e-2, steps)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    step, metrics = make_fit_step(partition, optimizer), []
    for number in range(steps):
        tokens = random_tokens((4, 48), seed=number + 1)
        window = windows[number % len(windows)]
        window = None if window is None else jnp.asarray(window)
        state, each = step(state, partition.frozen, tokens, None, window)
        metrics.append(each.gap_left)
    assert int(state.step) == steps
    assert step._cache_size() == len({window is None for window in windows})
    return state, np.array(metrics)


def test_thirty_steps_close_a_good_part_of_the_gap():
    model = _titan(MIXED, random=False, chunk_size=16, memory_rank=8)
    before = {path: np.array(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(model))}
    unseen = random_tokens((4, 48), seed=99)
    start = _gaps(model, unseen)[0]
    state, left = _fit(model, 30)
    assert left.shape == (30, 2)
    np.testing.assert_allclose(left[0], start, atol=0.05)
    load_trainable(model, dict(state.trainable), state.share)
    end = np.asarray(_gaps(model, unseen)[0])
    assert (end < 0.8).all()
    assert (end < start - 0.1).all()
    # The base model is what it was, bit for bit.
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        same = np.array_equal(variable.get_value(), before[path])
        assert same is not (is_memory(path) and path[-1] != "limit"), path


def test_a_fit_draws_windows_without_compiling_again():
    model = _titan(random=False)
    _, left = _fit(model, 6, windows=(3, 6, 4))
    assert np.isfinite(left).all()
    assert len(np.unique(left)) == left.size


def test_half_precision_is_fitted_in_float32():
    exact, low = _titan(), _titan(dtype=jnp.bfloat16)
    # The same weights in both, which bfloat16 can hold.
    values = dict(nnx.to_flat_state(nnx.state(low)))
    flat = [
        (path, x.replace(values[path].get_value().astype(jnp.float32)))
        for path, x in nnx.to_flat_state(nnx.state(exact))
    ]
    nnx.update(exact, nnx.from_flat_state(flat))
    (left, gradients), (want, want_gradients) = _gaps(low, TOKENS), _gaps(exact, TOKENS)
    assert left.dtype == jnp.float32
    np.testing.assert_allclose(left, want, rtol=0.03)
    for name, value in gradients.items():
        assert value.dtype == jnp.float32
        assert_close(value, want_gradients[name], 0.1, name)
