"""Measures of the recurrence against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tptt_jax.ops.delta_product.diagnostics import chunk_condition, half_life, relative_norm


def unit_keys(*shape):
    keys = np.random.default_rng(0).normal(size=shape)
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_condition_is_that_of_the_worst_chunk(per_channel):
    rng, (length, steps, heads, dim, chunk) = np.random.default_rng(1), (13, 2, 2, 4, 5)
    keys = unit_keys(1, length, steps, heads, dim)
    gate = rng.uniform(0, 2, (1, length, steps, heads))
    beta = gate[..., None] * rng.uniform(0.5, 1, dim) if per_channel else gate
    decay = -rng.uniform(0, 0.3, (1, length, heads))
    ids = np.repeat([[1, 2]], [6, 7], axis=1)
    expected = []
    for head in range(heads):
        for start in (3, 8):  # the whole chunks at the row's end
            rows = [(t, n) for t in range(start, start + chunk) for n in range(steps)]
            system = np.eye(len(rows))
            for i, (t, n) in enumerate(rows):
                for j, (s, m) in enumerate(rows[:i]):
                    factor = np.exp(decay[0, s + 1 : t + 1, head].sum()) * (ids[0, s] == ids[0, t])
                    left = beta[0, t, n, head] * keys[0, t, n, head]
                    system[i, j] = factor * (left @ keys[0, s, m, head])
            expected.append(np.linalg.cond(system, 1))
    found = chunk_condition(*map(jnp.asarray, (keys, beta, decay, ids)), chunk)
    np.testing.assert_allclose(found, max(expected), rtol=1e-4)


def test_equal_keys_with_large_gates_are_ill_conditioned():
    keys = jnp.broadcast_to(jnp.eye(4)[0], (1, 32, 1, 1, 4))
    found = [
        chunk_condition(keys, jnp.full((1, 32, 1, 1), beta), None, None, 32) for beta in (0.0, 4.0)
    ]
    assert found[0] == 1
    assert found[1] > 1e12


def test_orthogonal_keys_leave_a_norm_of_one():
    values = 3.0 * jax.random.normal(jax.random.key(0), (1, 8, 1, 2, 5))
    state = jnp.moveaxis(values[0, :, 0], 1, 0)[None]  # 8 keys e_1 ... e_8
    valid = jnp.ones((1, 8), bool)
    norms = np.linalg.norm(state, axis=(-2, -1)) / np.sqrt(8 * np.mean(values**2, (0, 1, 2, 4)) * 5)
    np.testing.assert_allclose(relative_norm(state, values, valid), norms.max(), rtol=1e-5)
    assert 0.99 < norms.max() < 1.01
    assert relative_norm(state.at[0, 0, 0, 0].set(jnp.nan), values, valid) == np.inf


def test_the_half_life_is_that_of_tokens_that_are_written():
    decay = jnp.full((1, 10, 3), jnp.log(0.5) / 7).at[:, 5:].set(-100.0)
    valid = jnp.arange(10)[None] < 5
    np.testing.assert_allclose(half_life(decay, valid), 7, rtol=1e-5)
    assert half_life(None, valid) == np.inf
