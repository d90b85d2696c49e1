"""Eviction of tokens from a window, against loops over places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from tests.contracts import quick_jit
from tptt_jax.ops.documents import count_positions
from tptt_jax.ops.eviction import delay_tokens, evicted_ids

T = 7


def _values(dtype=np.float32):
    return np.random.default_rng(0).integers(1, 100, (2, T, 3, 2)).astype(dtype)


def _slow_delay(x, steps):
    out = np.zeros_like(x)
    for t in range(steps, x.shape[1]):
        out[:, t] = x[:, t - steps]
    return out


@pytest.mark.parametrize("steps", [0, 1, 4, T - 1, T, T + 5])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16], ids=lambda x: x.__name__)
def test_every_place_gets_an_earlier_one(steps, dtype):
    x = _values(dtype)
    got = delay_tokens(jnp.asarray(x), steps)
    assert got.dtype == dtype
    assert_array_equal(got, _slow_delay(x, steps))


@pytest.mark.parametrize("most", [4, T, T + 5])
def test_a_traced_number_of_steps_gives_the_same_and_compiles_once(most):
    x = _values()
    run = quick_jit(functools.partial(delay_tokens, most=most))
    # A row is all that can be delayed.
    for steps in range(min(most, T) + 1):
        assert_array_equal(run(x, jnp.asarray(steps)), _slow_delay(x, steps))
    assert run._cache_size() == 1


@pytest.mark.parametrize("steps", [0, 3, T])
def test_gradients_go_back_to_the_place_they_came_from(steps):
    weights = jnp.asarray(_values())

    def gradient(delay):
        loss = quick_jit(jax.grad(lambda x, steps: jnp.sum(delay(x, steps) * weights)))
        return loss(jnp.ones(weights.shape), jnp.asarray(steps))

    want = np.flip(_slow_delay(np.flip(np.asarray(weights), 1), steps), 1)
    assert_array_equal(gradient(lambda x, _: delay_tokens(x, steps)), want)
    assert_array_equal(gradient(functools.partial(delay_tokens, most=T)), want)


def test_a_traced_number_of_steps_needs_a_bound():
    with pytest.raises(AssertionError, match="needs a bound"):
        delay_tokens(jnp.ones((1, 3)), jnp.asarray(2))


@quick_jit
def leaving(ids, window):
    """Documents of what leaves at each place, and ids `window` places before."""
    positions = count_positions(ids.shape, ids, None)
    return evicted_ids(positions, ids, window), delay_tokens(ids, window, 16)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(1, 8),
)
@settings(deadline=None, max_examples=40)
def test_what_leaves_belongs_to_the_document_it_leaves(runs, window):
    """Documents of any lengths side by side; padding at the end of the row."""
    ids = np.concatenate([np.repeat(number, size) for number, size in runs if number] or [[]])
    ids = np.pad(ids[:16], (0, 16 - len(ids[:16]))).astype(np.int32)
    got, delayed = (np.asarray(x)[0] for x in leaving(ids[None], jnp.asarray(window)))
    positions = count_positions((1, 16), jnp.asarray(ids[None]), None)
    assert_array_equal(evicted_ids(positions, jnp.asarray(ids[None]), window)[0], got)
    start, document = 0, 1
    for t, number in enumerate(ids):
        if t and number and ids[t - 1] != number:
            # An id that comes back is another document.
            start, document = t, document + 1
        leaves = number != 0 and t - start >= window
        assert got[t] == (document if leaves else 0)
        if leaves:
            # The place that `delay_tokens` takes the token from is in the same document.
            assert delayed[t] == number


def test_without_ids_a_row_is_document_one():
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    assert_array_equal(evicted_ids(positions, None, 3), [[0, 0, 0, 1, 1]] * 2)
    assert_array_equal(evicted_ids(positions, None, jnp.asarray(3)), [[0, 0, 0, 1, 1]] * 2)
    # A row that goes on from an earlier call.
    assert_array_equal(evicted_ids(positions + jnp.array([[2], [9]]), None, 3)[0], [0, 1, 1, 1, 1])
