"""Shifts within documents, against loops over tokens."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tptt_jax.ops import document_ordinals, shift_tokens

# Here compiling takes the time, not running.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
LENGTH = 9
# Left padding, padding inside a document, an id that returns, right padding.
IDS = np.array([[0, 5, 5, 0, 5, 2, 5, 5, 0], [1, 0, 0, 1, 1, 0, 3, 3, 3]])
segment_rows = st.lists(
    st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH), min_size=2, max_size=2
)


def _documents(ids):
    """Positions of the valid tokens of every document of a row, in order."""
    documents, current = [], 0
    for position, document in enumerate(ids):
        if document and document != current:
            documents.append([])
            current = document
        if document:
            documents[-1].append(position)
    return documents


def _slow_shift(x, steps, segment_ids):
    out, exists = np.zeros_like(x), np.zeros(segment_ids.shape, bool)
    for row, ids in enumerate(segment_ids):
        for positions in _documents(ids):
            for source, target in zip(positions, positions[steps:], strict=False):
                out[row, target], exists[row, target] = x[row, source], True
    return out, exists


def _values(seed=0, shape=(2, LENGTH, 3)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_document_ordinals_by_hand():
    got = jax.jit(document_ordinals, **QUICK)(jnp.asarray(IDS))
    assert got.tolist() == [[0, 0, 0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("steps", [0, 1, 2, LENGTH + 3])
def test_shift_equals_loop(steps):
    x = _values()
    for ids in (IDS, np.ones_like(IDS)):
        want, want_exists = _slow_shift(x, steps, ids)
        got, exists = _shift(x, jnp.asarray(ids), steps)
        assert np.array_equal(got, want)
        assert np.array_equal(exists, want_exists)
    # Without ids a row is one document (the last of the two above).
    got, exists = shift_tokens(jnp.asarray(x), steps)
    assert np.array_equal(got, want)
    assert np.array_equal(exists, want_exists)


@settings(deadline=None, max_examples=30)
@given(rows=segment_rows, steps=st.sampled_from([1, 2]))
def test_shift_and_gradient_equal_loops_for_any_ids(rows, steps):
    ids, x, weight = np.array(rows), _values(1), _values(2)
    want, want_exists = _slow_shift(x, steps, ids)
    got, exists = _shift(x, jnp.asarray(ids), steps)
    assert np.array_equal(got, want)
    assert np.array_equal(exists, want_exists)
    # The map is linear, so its matrix against the gradient: <w, shift(x)> = <grad, x>.
    grad = np.asarray(_shift_gradient_quick(x, weight, jnp.asarray(ids), steps))
    want_grad = np.zeros_like(x)
    for row, row_ids in enumerate(ids):
        for positions in _documents(row_ids):
            for source, target in zip(positions, positions[steps:], strict=False):
                want_grad[row, source] += weight[row, target]
    assert np.array_equal(grad, want_grad)


_shift = jax.jit(lambda x, ids, steps: shift_tokens(x, steps, ids), static_argnums=2, **QUICK)
_shift_gradient = jax.grad(
    lambda x, weight, ids, steps: jnp.sum(shift_tokens(x, steps, ids)[0] * weight)
)
_shift_gradient_quick = jax.jit(_shift_gradient, static_argnums=3, **QUICK)


def test_gradient_is_a_gather():
    program = str(jax.make_jaxpr(_shift_gradient, static_argnums=3)(_values(), 1.0, IDS, 1))
    assert "scatter" not in program


def test_integers_shift_too():
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    got, _ = _shift(tokens, jnp.asarray(IDS), 1)
    assert got.dtype == tokens.dtype
    assert got[0].tolist() == [0, 0, 1, 0, 2, 0, 0, 6, 0]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"at least 0 .*got -1"):
        shift_tokens(jnp.zeros((1, 3, 2)), -1)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(1, 3\).*got \(1, 4\)"):
        shift_tokens(jnp.zeros((1, 3, 2)), 1, jnp.ones((1, 4), int))
