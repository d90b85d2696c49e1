"""Mixing of softmax and a memory of every token, against formulas in float64 numpy."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import assert_close, quick_jit, randomize
from tptt_jax import LizaConfig, ModelConfig
from tptt_jax.config import AttentionConfig
from tptt_jax.layers.gates import MemoryGate
from tptt_jax.layers.liza import LayerTokens, LizaAttention
from tptt_jax.layers.mixing import match_rms
from tptt_jax.layers.parameters import MagParam
from tptt_jax.layers.softmax_attention import token_context
from tptt_jax.ops.attention import Attended

CONFIG = ModelConfig.tiny(attention=AttentionConfig(out_bias=True))
ROWS, T = 2, 6
SIZE = (ROWS, T, CONFIG.num_heads, CONFIG.head_dim)
match = quick_jit(match_rms)


def _inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ROWS, T, CONFIG.embed_dim)), dtype)
    # Heads of very different sizes, as pretrained models have them.
    sizes = np.array([1e-2, 1.0, 30.0, 0.2])[:, None]
    return x, jnp.asarray(rng.standard_normal(SIZE) * sizes, dtype)


def _tokens(liza, share=None):
    positions = jnp.broadcast_to(jnp.arange(T), (ROWS, T))
    context = token_context(CONFIG, liza, "full", positions, None, None)
    return LayerTokens({"full": context}, ("full",), share=share)


def _given(soft):
    """Puts this output in the place of softmax attention."""

    def attend(settings, context, q, k, v, cache):
        assert q.shape == soft.shape
        return Attended(soft, None), k

    return mock.patch("tptt_jax.layers.liza.apply_softmax", attend)


def _run(dtype=jnp.float32, share=None, use_memory=True, **options):
    """A layer whose softmax branch is given, and what came out."""
    liza = LizaConfig(writes="all", **{"chunk_size": 4} | options)
    layer = LizaAttention(CONFIG, liza, None, dtype=dtype, rngs=nnx.Rngs(0))
    randomize(layer)
    graphdef, state = nnx.split(layer)
    x, soft = _inputs(dtype)

    @quick_jit
    def call(state, x, soft, share):
        with _given(soft):
            layer = nnx.merge(graphdef, state)
            return layer(x, _tokens(liza, share), use_memory=use_memory)

    share = None if share is None else jnp.asarray(share, jnp.float32)
    return layer, soft, call(state, x, soft, share)


def _rms(x, eps=0.0):
    return np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def _mixture(layer, soft, linear, mu, liza):
    """DESIGN.md section 3, term by term."""
    soft, linear = (np.asarray(x, np.float64) for x in (soft, linear))
    kernel, bias = (
        np.asarray(x, np.float64) for x in (layer.o_proj.kernel[...], layer.o_proj.bias[...])
    )

    def project(y):
        return y.reshape(ROWS, T, -1) @ kernel

    if liza.linear_scale == "match":
        linear = linear * _rms(soft) / _rms(linear)
    soft_term, linear_term = project((1 - mu) * soft) + bias, project(mu * linear)
    if liza.linear_scale == "projected":
        linear_term = linear_term * _rms(project(soft) + bias, 1e-5)
    out = soft_term + linear_term
    return out + soft_term * linear_term if liza.cross_gate else out


@pytest.mark.parametrize("cross_gate", [False, True], ids=["sum", "cross gate"])
@pytest.mark.parametrize("scale", ["match", "unit", "projected"])
def test_mixture_equals_the_formula(scale, cross_gate):
    layer, soft, got = _run(linear_scale=scale, cross_gate=cross_gate, mag_init=0.3)
    mu = 1 / (1 + np.exp(-np.asarray(layer.mag.logit[...], np.float64)))[:, None]
    assert len(np.unique(mu)) == CONFIG.num_heads
    assert_array_equal(got.branches.softmax, soft)
    want = _mixture(layer, soft, got.branches.linear, mu, layer.liza)
    assert_close(got.out, want, 1e-5, scale)


@pytest.mark.parametrize("scale", ["unit", "projected"])
def test_a_scheduled_share_is_one_number_for_all_heads(scale):
    layer, soft, got = _run(share=0.7, mag="scheduled", linear_scale=scale)
    assert layer.mag is None
    assert_close(got.out, _mixture(layer, soft, got.branches.linear, 0.7, layer.liza), 1e-5, scale)


def test_projected_is_what_the_reference_writes():
    # tptt 0.12.1: (1 - mu) P(soft) + mu P(linear) rms(P(soft)).
    layer, soft, got = _run(share=0.3, mag="scheduled", linear_scale="projected")
    kernel, bias = np.asarray(layer.o_proj.kernel[...]), np.asarray(layer.o_proj.bias[...])
    layer.o_proj.bias[...] = jnp.zeros_like(layer.o_proj.bias[...])
    base, linear = (
        np.asarray(y).reshape(ROWS, T, -1) @ kernel for y in (soft, got.branches.linear)
    )
    want = 0.7 * base + 0.3 * linear * _rms(base + bias, 1e-5) + bias
    assert_close(got.out, want, 1e-5, "output")


def test_the_memory_has_unit_rms_over_all_heads():
    _, _, got = _run()
    merged = np.asarray(got.branches.linear).reshape(ROWS, T, -1)
    assert_allclose(_rms(merged), np.ones((ROWS, T, 1)), rtol=1e-3)


def test_memory_off_is_the_projected_softmax():
    layer, soft, got = _run(use_memory=False)
    want = np.asarray(soft).reshape(ROWS, T, -1) @ layer.o_proj.kernel[...] + layer.o_proj.bias[...]
    assert_close(got.out, want, 1e-6, "output")
    assert got.branches.linear is None


def test_without_softmax_the_memory_is_all():
    layer, _, got = _run(softmax=False)
    assert layer.mag is None
    assert got.keys is None
    assert got.branches.softmax is None
    linear = np.asarray(got.branches.linear).reshape(ROWS, T, -1)
    assert_close(got.out, linear @ layer.o_proj.kernel[...] + layer.o_proj.bias[...], 1e-6, "out")


@given(
    arrays(np.float32, (2, 3, 2, 4), elements=st.floats(-100, 100, width=32)),
    st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_match_gives_every_head_and_token_the_rms_of_softmax(soft, seed):
    linear = np.random.default_rng(seed).standard_normal((2, 3, 2, 4)).astype(np.float32)
    linear /= _rms(linear.reshape(2, 3, -1))[..., None]
    got = np.asarray(match(linear, soft))
    # 1e-6 is all that a silent head may be given.
    assert_allclose(_rms(got), _rms(soft), rtol=1e-3, atol=3e-6)
    cosine = (got * linear).sum(-1)
    assert (cosine > 0).all()
    assert_allclose(np.cross(got[..., :3], linear[..., :3]) / (_rms(got) + 1), 0, atol=1e-4)


def test_match_is_finite_for_silent_heads():
    soft = jnp.ones((1, 2, 2, 4)).at[0, 0, 1].set(0.0)
    linear = jnp.ones((1, 2, 2, 4)).at[0, 1, 0].set(0.0)
    value, grads = quick_jit(
        jax.value_and_grad(lambda a, b: jnp.sum(match_rms(a, b)), argnums=(0, 1))
    )(linear, soft)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)
    got = match(linear, soft)
    assert_allclose(got[0, 0, 1], 0, atol=1e-5)
    assert_array_equal(got[0, 1, 0], np.zeros(4))


@pytest.mark.parametrize("init", [0.01, 0.05, 0.5, 0.999])
def test_every_share_starts_at_mag_init(init):
    gate = MemoryGate(7, init)
    assert isinstance(gate.logit, MagParam)
    assert gate.logit[...].dtype == jnp.float32
    assert_allclose(gate(), np.full(7, init), rtol=1e-5)


def test_learned_shares_get_a_gradient_each():
    layer, soft, _ = _run(mag_init=0.3)
    graphdef, shares, rest = nnx.split(layer, MagParam, ...)

    def loss(shares):
        with _given(soft):
            out = nnx.merge(graphdef, shares, rest)(_inputs()[0], _tokens(layer.liza)).out
        return jnp.sum(out**2)

    gradient = np.asarray(quick_jit(jax.grad(loss))(shares)["mag"]["logit"][...])
    assert gradient.shape == (CONFIG.num_heads,)
    assert (gradient != 0).all()


def test_bfloat16_stays_close_to_float32():
    _, _, low = _run(jnp.bfloat16, mag_init=0.3, cross_gate=True, linear_scale="projected")
    assert low.out.dtype == low.branches.linear.dtype == jnp.bfloat16
    _, _, exact = _run(mag_init=0.3, cross_gate=True, linear_scale="projected")
    assert_close(low.out.astype(jnp.float32), exact.out, 0.05, "output")
