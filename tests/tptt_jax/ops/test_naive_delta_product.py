"""The token recurrence against the formulas written out with numpy matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tptt_jax.ops import activate_state, naive_delta_product

# An id that returns, padding on the left, inside a document and on the right.
IDS = np.array([[0, 5, 5, 0, 5, 2, 5, 5, 0], [1, 0, 0, 1, 1, 0, 3, 3, 3]])
# Here compiling takes the time, not running.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
naive = jax.jit(naive_delta_product, static_argnames="state_activation", **QUICK)


def _inputs(vector, value_dim=4):
    rng = np.random.default_rng(0)
    batch, length, heads, kv_heads, steps, dim = 2, 9, 4, 2, 2, 4
    q = rng.standard_normal((batch, length, heads, dim))
    k = rng.standard_normal((batch, length, steps, kv_heads, dim)) / 2
    v = rng.standard_normal((batch, length, steps, kv_heads, value_dim))
    beta = rng.random((*k.shape[:-1], dim) if vector else k.shape[:-1])
    log_decay = -rng.random((batch, length, kv_heads))
    state = rng.standard_normal((batch, kv_heads, dim, value_dim))
    return q, k, v, beta, log_decay, state


def _by_hand(q, k, v, beta, log_decay, state, ids):
    """S <- S (as a matrix product) for one row and one KV head; q [T, G, D]."""
    out, first = np.zeros((*q.shape[:2], v.shape[-1])), next(i for i in ids if i)
    current = first
    for t, document in enumerate(ids):
        if not document:
            continue
        if document != current:
            state, current = np.zeros_like(state), document
        state = np.exp(log_decay[t]) * state
        for j in range(k.shape[1]):
            scaled = beta[t, j] * k[t, j]
            transition = np.eye(len(scaled)) - np.outer(k[t, j], scaled)
            state = transition @ state + np.outer(k[t, j], beta[t, j] * v[t, j])
        out[t] = q[t] @ state
    return out, state


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_recurrence_equals_matrices_written_out(vector):
    q, k, v, beta, log_decay, state = inputs = _inputs(vector)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in inputs]
        out, final = naive(*arrays, segment_ids=jnp.asarray(IDS))
    assert out.dtype == final.dtype == jnp.float64
    for b in range(2):
        for head in range(2):
            group = slice(2 * head, 2 * head + 2)
            row = (q[b, :, group], k[b, :, :, head], v[b, :, :, head], beta[b, :, :, head])
            want, want_final = _by_hand(*row, log_decay[b, :, head], state[b, head], IDS[b])
            assert_allclose(np.asarray(out)[b, :, group], want, rtol=0, atol=1e-12)
            assert_allclose(np.asarray(final)[b, head], want_final, rtol=0, atol=1e-12)


def test_values_may_be_wider_than_keys():
    q, k, v, beta, _, _ = (jnp.asarray(x, jnp.float32) for x in _inputs(False, value_dim=7))
    out, final = naive(q, k, v, beta)
    narrow, narrow_final = naive(q, k, v[..., :3], beta)
    assert out.shape == (2, 9, 4, 7)
    assert_allclose(out[..., :3], narrow, atol=1e-5)
    assert_allclose(final[..., :3], narrow_final, atol=1e-5)


def test_state_is_activated_after_the_marked_tokens():
    q, k, v, beta, _, _ = (jnp.asarray(x, jnp.float32) for x in _inputs(False))
    marks = np.zeros((2, 9), bool)
    marks[0, 3] = True
    out, _ = naive(q, k, v, beta, state_activation="gelu", activate_after=jnp.asarray(marks))
    head, state = naive(*(x[:, :4] for x in (q, k, v, beta)))
    state = state.at[0].set(activate_state(state[0]))
    tail, _ = naive(*(x[:, 4:] for x in (q, k, v, beta)), initial_state=state)
    assert_allclose(out, jnp.concatenate([head, tail], axis=1), atol=1e-5)


def test_activation_equals_its_formula_and_has_a_gradient_at_zero():
    state = np.random.default_rng(1).standard_normal((3, 5)) * 4
    norm = np.linalg.norm(state, axis=-1, keepdims=True)
    x = 2 * state / (norm + 1e-6)
    gelu = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    got = jax.jit(activate_state)(jnp.asarray(state, jnp.float32))
    assert_allclose(got, state / 2 * gelu, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(activate_state(s))))(jnp.zeros((2, 3)))
    assert np.array_equal(gradient, np.zeros((2, 3)))


def test_gelu_without_marks_is_refused():
    q, k, v, beta, _, _ = (jnp.asarray(x) for x in _inputs(False))
    with pytest.raises(ValueError, match=r"needs activate_after of shape \(2, 9\).*got None"):
        naive_delta_product(q, k, v, beta, state_activation="gelu")
