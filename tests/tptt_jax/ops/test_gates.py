"""Gates against loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tptt_jax.ops import causal_mean, compute_beta, compute_gate, compute_log_decay

# Left padding, padding inside a document, an id that returns, right padding.
IDS = np.array([[0, 5, 5, 0, 5, 2, 5, 5, 0], [1, 0, 0, 1, 1, 0, 3, 3, 3]])
VALID = IDS != 0
# Here compiling takes the time, not running.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
mean = jax.jit(causal_mean, **QUICK)
gate_of = jax.jit(compute_gate, static_argnames=("kind", "vector"), **QUICK)


def _keys_and_values():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 2, 9, 3, 4))


def _slow_mean(x, segment_ids):
    out = x.copy()
    for row, ids in enumerate(segment_ids):
        window, current = [], 0
        for t, document in enumerate(ids):
            if not document:
                continue
            if document != current:
                window, current = [x[row, t]] * 3, document
            else:
                window = [*window[1:], x[row, t]]
            out[row, t] = sum(window) / 3
    return out


def _slow_gate(kind, k, v, segment_ids):
    sigmoid = {
        name: 1 / (1 + np.exp(-_slow_mean(x, segment_ids))) for name, x in (("k", k), ("v", v))
    }
    return {"k": sigmoid["k"], "v": sigmoid["v"], "kv": sigmoid["k"] * sigmoid["v"]}[kind]


@functools.partial(jax.jit, static_argnames="trick", **QUICK)
def all_betas(trick, k, v, segment_ids):
    repeated = compute_beta("k", k, v, 2, segment_ids=segment_ids)
    options = {"segment_ids": segment_ids, "trick": trick}
    return (
        repeated,
        compute_beta("k", k, v, 2, vector=True, **options),
        compute_beta("k", k, v, 2, **options),
    )


@functools.partial(jax.jit, static_argnames="kind", **QUICK)
def all_gates(kind, *arrays):
    vector = compute_gate(kind, *arrays, vector=True)
    return vector, compute_gate(kind, *arrays), compute_log_decay(kind, *arrays)


def _jax(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def test_causal_mean_equals_loop():
    k, _ = _keys_and_values()
    got = mean(*_jax(k), jnp.asarray(IDS))
    assert_allclose(np.asarray(got)[VALID], _slow_mean(k, IDS)[VALID], atol=1e-6)
    assert_allclose(mean(*_jax(k)), _slow_mean(k, np.ones_like(IDS)), atol=1e-6)


@pytest.mark.parametrize("kind", ["k", "v", "kv"])
def test_gates_equal_loops(kind):
    k, v = _keys_and_values()
    want, ids = _slow_gate(kind, k, v, IDS), jnp.asarray(IDS)
    vector, scalar, log_decay = (np.asarray(x) for x in all_gates(kind, *_jax(k, v), ids))
    assert_allclose(vector[VALID], want[VALID], atol=1e-6)
    assert_allclose(scalar[VALID], want.mean(-1)[VALID], atol=1e-6)
    assert_allclose(log_decay[VALID], np.log(want.mean(-1))[VALID], atol=1e-6)


def test_constant_gate_is_one_half_and_forgets_nothing():
    k, v = _jax(*_keys_and_values())
    for vector, shape in ((False, (2, 9, 3)), (True, (2, 9, 3, 4))):
        gate = compute_gate("constant", k, v, vector=vector)
        assert gate.shape == shape
        assert bool(jnp.all(gate == 0.5))
    assert compute_log_decay("constant", k, v) is None


def test_gates_of_low_precision_inputs_are_float32():
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in _keys_and_values())
    want = _slow_gate("k", *(np.asarray(x, np.float64) for x in (k, v)), np.ones_like(IDS))
    got = gate_of("k", k, v, vector=True)
    assert got.dtype == jnp.float32
    assert_allclose(got, want, atol=1e-6)
    assert compute_gate("constant", k, v).dtype == jnp.float32


@pytest.mark.parametrize("trick", ["derivative", "rotary", "combined"])
def test_beta_is_repeated_or_expanded_like_keys(trick):
    k, v = _keys_and_values()
    gate, ids = _slow_gate("k", k, v, IDS), jnp.asarray(IDS)
    repeated, vector, scalar = (np.asarray(x) for x in all_betas(trick, *_jax(k, v), ids))
    assert_allclose(repeated[VALID], np.repeat(gate.mean(-1)[:, :, None], 2, 2)[VALID], atol=1e-6)

    lagged = np.zeros_like(gate)
    lagged[0, [2, 4, 7]] = gate[0, [1, 2, 6]]
    lagged[1, [3, 4, 7, 8]] = gate[1, [0, 3, 6, 7]]
    second = {"derivative": (gate - lagged) / 2, "rotary": -gate}
    second["combined"] = (second["derivative"] + second["rotary"]) / 2
    want = np.stack([gate, second[trick]], axis=2)
    assert_allclose(vector[VALID], want[VALID], atol=1e-6)
    assert_allclose(scalar[VALID], want.mean(-1)[VALID], atol=1e-6)


@pytest.mark.parametrize("value", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_log_decay_is_safe_for_extreme_inputs(value):
    x = jnp.full((1, 3, 1, 4), value)
    got, grad = _log_decay_and_gradient(x)
    # log sigmoid(x) is x far below 0, and -exp(-x) far above.
    want = 2 * (-np.log(2) if value == 0 else min(value, 0.0))
    assert_allclose(got, np.full((1, 3, 1), want), rtol=1e-6, atol=1e-6)
    assert bool(jnp.all(got <= 0))
    assert bool(jnp.all(jnp.isfinite(grad)))


@functools.partial(jax.jit, **QUICK)
def _log_decay_and_gradient(x):
    gradient = jax.grad(lambda x: jnp.sum(compute_log_decay("kv", x, x)))
    return compute_log_decay("kv", x, x), gradient(x)


def test_unknown_gate_is_refused():
    x = jnp.zeros((1, 2, 1, 4))
    for function in (compute_gate, compute_log_decay):
        with pytest.raises(ValueError, match="must be one of k, v, kv, constant, got 'q'"):
            function("q", x, x)
