"""RMS norms against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tptt_jax.config import NormConfig
from tptt_jax.layers.norm import NormLayer, rms_normalize

DIM = 12


def _inputs(dtype=jnp.float32):
    x = np.random.default_rng(0).standard_normal((2, 5, DIM)) * 3
    return jnp.asarray(x, dtype)


def _norm(offset, dtype=jnp.float32, eps=1e-2):
    norm = NormLayer(DIM, NormConfig(eps=eps, offset=offset), dtype=dtype)
    norm.weight[...] = jnp.asarray(np.linspace(-1, 2, DIM), dtype)
    return norm


def _slow(x, factor, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).sum(-1, keepdims=True) / DIM + eps) * factor


@pytest.mark.parametrize("offset", [False, True], ids=["llama", "gemma"])
def test_equals_the_formula(offset):
    norm, x = _norm(offset), _inputs()
    want = _slow(x, np.linspace(-1, 2, DIM) + offset, 1e-2)
    assert_allclose(norm(x), want, atol=2e-6)


@pytest.mark.parametrize("offset", [False, True], ids=["llama", "gemma"])
def test_starts_as_plain_normalisation(offset):
    norm, x = NormLayer(DIM, NormConfig(offset=offset), dtype=jnp.float32), _inputs()
    assert_allclose(norm(x), _slow(x, 1, 1e-6), atol=2e-6)


def test_llama_rounds_before_the_weight_and_gemma_after():
    x = _inputs(jnp.bfloat16)
    normal = rms_normalize(x, 1e-2)
    assert normal.dtype == jnp.float32
    llama, gemma = _norm(False, jnp.bfloat16), _norm(True, jnp.bfloat16)
    early = normal.astype(jnp.bfloat16) * llama.weight[...]
    late = (normal * (1 + gemma.weight[...].astype(jnp.float32))).astype(jnp.bfloat16)
    assert llama(x).dtype == gemma(x).dtype == jnp.bfloat16
    assert_array_equal(llama(x), early)
    assert_array_equal(gemma(x), late)
    # The two orders are not the same thing.
    assert bool(jnp.any((normal * llama.weight[...]).astype(jnp.bfloat16) != early))


def test_squares_of_low_precision_inputs_do_not_overflow():
    x = jnp.full((1, DIM), 6e4, jnp.float16)
    norm = NormLayer(DIM, NormConfig(), dtype=jnp.float16)
    assert_allclose(norm(x), np.ones((1, DIM)), rtol=1e-3)


def test_two_axes_are_one_longer_axis():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, 3, DIM)), jnp.float32)
    joined = rms_normalize(x.reshape(2, 4, -1)).reshape(x.shape)
    assert_allclose(rms_normalize(x, axis=(-2, -1)), joined, atol=1e-6)


def test_zeros_stay_zeros():
    assert_array_equal(rms_normalize(jnp.zeros((1, DIM))), np.zeros((1, DIM)))
