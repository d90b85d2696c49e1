"""Virtual tokens against loops over tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tptt_jax.ops import expand_virtual_tokens

# Left padding, padding inside a document, an id that returns, right padding.
IDS = np.array([[0, 5, 5, 0, 5, 2, 5, 5, 0], [1, 0, 0, 1, 1, 0, 3, 3, 3]])
# Here compiling takes the time, not running.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
STATIC = ("num_householder", "trick")
expand = jax.jit(expand_virtual_tokens, static_argnames=STATIC, **QUICK)


def _values(dim=5, seed=0):
    return np.random.default_rng(seed).standard_normal((2, 9, 3, dim))


def _slow_derivative(x, steps, segment_ids):
    """sum_j (-1)^j binomial(m, j) x_{t - j} / 2^m over the document's own tokens."""
    out = np.zeros((*x.shape[:2], steps, *x.shape[2:]))
    for row, ids in enumerate(segment_ids):
        seen, current = [], 0
        for t, document in enumerate(ids):
            if not document:
                continue
            seen = [*seen, x[row, t]] if document == current else [x[row, t]]
            current = document
            for m in range(steps):
                for j in range(min(m + 1, len(seen))):
                    out[row, t, m] += (-1) ** j * math.comb(m, j) * seen[-1 - j] / 2**m
    return out


def _slow_rotary(x, steps):
    out = np.repeat(x[:, :, None], steps, axis=2)
    for m in range(steps):
        turn = np.exp(2j * np.pi * m / steps)
        for pair in range(0, x.shape[-1] - 1, 2):
            turned = (x[..., pair] + 1j * x[..., pair + 1]) * turn
            out[:, :, m, ..., pair], out[:, :, m, ..., pair + 1] = turned.real, turned.imag
    return out


@pytest.mark.parametrize(("steps", "dim"), [(2, 4), (3, 5), (5, 1)])
def test_all_tricks_equal_loops(steps, dim):
    x, valid = _values(dim), IDS != 0
    want = {"derivative": _slow_derivative(x, steps, IDS), "rotary": _slow_rotary(x, steps)}
    want["combined"] = (want["derivative"] + want["rotary"]) / 2
    for trick, expected in want.items():
        got = expand(jnp.asarray(x, jnp.float32), steps, trick, jnp.asarray(IDS))
        assert got.shape == (2, 9, steps, 3, dim)
        assert_allclose(np.asarray(got)[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_without_ids_a_row_is_one_document():
    x = jnp.asarray(_values(), jnp.float32)
    got = expand(x, 3, "derivative")
    assert_allclose(got, _slow_derivative(np.asarray(x), 3, np.ones_like(IDS)), atol=1e-6)


@pytest.mark.parametrize("trick", ["derivative", "rotary", "combined"])
def test_packed_documents_equal_separate_ones(trick):
    x = jnp.asarray(_values()[:1], jnp.float32)
    packed = expand(x, 3, trick, jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]]))
    first, second = (expand(part, 3, trick) for part in (x[:, :4], x[:, 4:]))
    assert_allclose(packed, jnp.concatenate([first, second], axis=1), atol=1e-6)


@pytest.mark.parametrize("trick", ["derivative", "rotary", "combined"])
def test_one_step_is_the_token_itself(trick):
    x = jnp.asarray(_values(), jnp.bfloat16)
    got = expand(x, 1, trick)
    assert got.dtype == x.dtype
    assert bool(jnp.all(got == x[:, :, None]))


def test_padding_gets_no_gradient_from_valid_tokens():
    x = jnp.asarray(_values(), jnp.float32)
    valid = jnp.asarray(IDS != 0)[:, :, None, None, None]

    def loss(x):
        virtual = expand_virtual_tokens(x, 3, "combined", jnp.asarray(IDS))
        return jnp.sum(jnp.where(valid, virtual, 0) ** 2)

    grad = np.asarray(jax.jit(jax.grad(loss), **QUICK)(x))
    assert not grad[IDS == 0].any()
    assert grad[IDS != 0].all()


def test_low_precision_differences_are_taken_in_float32():
    x = jnp.asarray(_values() + 8, jnp.bfloat16)
    got = expand(x, 3, "derivative", jnp.asarray(IDS))
    want = _slow_derivative(np.asarray(x, np.float64), 3, IDS)
    assert got.dtype == jnp.bfloat16
    # One rounding at the end: half a unit in the last of 8 bits.
    valid = IDS != 0
    assert_allclose(np.asarray(got, np.float64)[valid], want[valid], rtol=2**-8, atol=1e-6)


def test_bad_arguments_are_refused():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        expand_virtual_tokens(x, 0, "rotary")
    with pytest.raises(ValueError, match=r"trick must be one of .*got 'integral'"):
        expand_virtual_tokens(x, 2, "integral")
