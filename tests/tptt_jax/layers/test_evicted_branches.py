"""Which token is seen through which branch: the window, the sinks or the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import jitted, quick_jit, raise_shares, random_tokens, randomize
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.config import AttentionConfig
from tptt_jax.layers.liza import LayerTokens, LizaAttention
from tptt_jax.layers.softmax_attention import token_context
from tptt_jax.model import base_model, init_cache
from tptt_jax.ops.documents import count_positions

ONE = ModelConfig.tiny(num_layers=1, mlp_dim=16)
TWO = ModelConfig.tiny(num_layers=2, mlp_dim=16)
WINDOW, SINKS, T = 4, 2, 16


def _model(config=ONE, **options):
    defaults = {"softmax_window": WINDOW, "softmax_sinks": SINKS, "chunk_size": 8}
    liza = LizaConfig(**defaults | {"memory_rank": 2} | options)
    return raise_shares(randomize(CausalLM(config, liza, rngs=nnx.Rngs(0))))


def _jitted(model, **options):
    run = jitted(model, **options)
    return lambda tokens, cache=None: run(tokens, cache=cache)


def _changed(one, other):
    """The places at which any number of an array [1, T, ...] differs."""
    differs = np.asarray(one) != np.asarray(other)
    return set(np.flatnonzero(differs.any(axis=(0, *range(2, differs.ndim)))))


def test_a_token_is_seen_by_the_window_then_by_the_memory():
    run = _jitted(_model(), return_branches=True)
    tokens = random_tokens((1, T))
    before = run(tokens).branches[0]
    for place in range(T):
        other = tokens.copy()
        other[:, place] = (other[:, place] + 1) % 97
        after = run(other).branches[0]
        softmax, linear = (_changed(a[0], b[0]) for a, b in zip(before, after, strict=True))
        later = set(range(place, T))
        seen = later if place < SINKS else {t for t in later if t < place + WINDOW}
        assert softmax == seen
        # Its own query reads the memory, too.
        assert linear - {place} == later - seen


def test_sinks_never_enter_the_memory():
    model = _model()
    run, empty = _jitted(model), init_cache(model, 1, T)
    tokens = random_tokens((1, T))

    def state(tokens):
        return np.asarray(run(tokens, empty).cache.stacks[0].memory.state)

    before = state(tokens)
    assert before.any()
    for place in range(T):
        other = tokens.copy()
        other[:, place] = (other[:, place] + 1) % 97
        is_held = SINKS <= place < T - WINDOW
        assert np.array_equal(state(other), before) is not is_held


@pytest.mark.parametrize(
    "options",
    [{}, {"mag": "learned", "mag_init": 0.4}, {"mag": "scheduled", "mag_init": 0.4}],
    ids=["mass", "learned", "scheduled"],
)
def test_rows_that_fit_the_window_are_the_base_model_s_bit_for_bit(options):
    model = _model(TWO, **options)
    titan, base = _jitted(model), _jitted(base_model(model))
    tokens = random_tokens((2, WINDOW + SINKS + 1))
    assert_array_equal(titan(tokens[:, :WINDOW]).logits, base(tokens[:, :WINDOW]).logits)
    # Sinks leave the window and nobody misses them; the next token is missed.
    cache = init_cache(model, 2, T)
    off = _jitted(model, use_memory=False)
    on, without = titan(tokens, cache).logits, off(tokens, cache).logits
    assert_array_equal(on[:, :-1], without[:, :-1])
    assert _changed(on, without) == {WINDOW + SINKS}


def test_without_a_window_the_memory_is_idle():
    model = _model(TWO, softmax_window=None)
    tokens = random_tokens((2, T))
    assert_array_equal(_jitted(model)(tokens).logits, _jitted(base_model(model))(tokens).logits)
    cache = init_cache(model, 2, T)
    assert cache.stacks[0].memory is None
    assert cache.stacks[0].softmax["full"].sink_keys.size == 0


def test_writes_none_is_a_window_and_nothing_else():
    model = _model(TWO, writes="none", memory_rank=0)
    assert not any(
        "memory" in path or "mag" in path for path, _ in nnx.to_flat_state(nnx.state(model))
    )
    assert init_cache(model, 2, T).stacks[0].memory is None
    titan = _model(TWO)
    values = dict(nnx.to_flat_state(nnx.state(titan)))
    flat = [(path, values[path]) for path, _ in nnx.to_flat_state(nnx.state(model))]
    nnx.update(model, nnx.from_flat_state(flat))
    tokens = random_tokens((2, T))
    assert_array_equal(
        _jitted(model)(tokens).logits, _jitted(titan, use_memory=False)(tokens).logits
    )


# Keys that are all alike and not rotated: every visible token has the same weight.
EVEN = ModelConfig.tiny(
    embed_dim=64,
    position_embedding="learned",
    attention=AttentionConfig(bias=True, query_scale=0.7),
)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_the_share_is_the_evicted_part_of_the_softmax(packed):
    """With the true log Z_out in the gate, the mixture's weights are those of full attention."""
    liza = LizaConfig(softmax_window=WINDOW, softmax_sinks=SINKS, chunk_size=8)
    layer = randomize(LizaAttention(EVEN, liza, None, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    key = layer.k_proj.bias[...].reshape(EVEN.num_kv_heads, EVEN.head_dim) * 10
    layer.k_proj.bias[...] = key.reshape(-1)
    layer.k_proj.kernel[...] = jnp.zeros_like(layer.k_proj.kernel[...])
    layer.o_proj.kernel[...] = jnp.eye(EVEN.embed_dim)
    # log Z_out = log n + scale q . key
    groups = EVEN.num_heads // EVEN.num_kv_heads
    layer.mag.weight[...] = jnp.repeat(key, groups, axis=0) * EVEN.attention_scale
    layer.mag.slope[...] = jnp.ones(EVEN.num_heads)
    layer.mag.bias[...] = jnp.zeros(EVEN.num_heads)
    ids = np.array([[1] * 5 + [2] * 11]) if packed else None
    graphdef, state = nnx.split(layer)

    @quick_jit
    def run(state, x):
        ids_ = None if ids is None else jnp.asarray(ids)
        positions = count_positions(x.shape[:2], ids_, None)
        context = token_context(EVEN, liza, "full", positions, ids_, None)
        tokens = LayerTokens({"full": context}, ("full",))
        return nnx.merge(graphdef, state)(x, tokens)

    x = 3 * np.random.default_rng(0).standard_normal((1, T, EVEN.embed_dim))
    got = jax.tree.map(np.asarray, run(state, x.astype(np.float32)))
    soft, linear = (y.astype(np.float64)[0] for y in got.branches)
    mixed = got.out.reshape(soft.shape)
    share = ((mixed - soft) * (linear - soft)).sum(-1) / ((linear - soft) ** 2).sum(-1)
    places = np.arange(T) if ids is None else np.array([*range(5), *range(11)])
    held = np.maximum(places - WINDOW - SINKS + 1, 0)
    assert_allclose(share, np.repeat((held / (places + 1))[:, None], EVEN.num_heads, 1), atol=2e-6)
