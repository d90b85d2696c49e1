"""The triangular inverse and solve against numpy and the library's solve on single matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tptt_jax.ops import invert_unit_lower, solve_unit_lower

SIZES = [1, 2, 5, 16, 17, 128]
# Here compiling takes the time, not running.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
invert = jax.jit(invert_unit_lower, **QUICK)
solve = jax.jit(solve_unit_lower, **QUICK)


def _lower(size, batch=(2, 3), scale=0.3, seed=0):
    full = np.random.default_rng(seed).standard_normal((*batch, size, size)) * scale
    return np.tril(full, -1)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_equals_numpy_in_float64(size):
    lower = _lower(size, scale=0.1)
    with jax.enable_x64(True):
        got = invert(jnp.asarray(lower))
    assert got.dtype == jnp.float64
    assert_allclose(got, np.linalg.inv(np.eye(size) + lower), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [6, 128])
def test_inverse_survives_strongly_correlated_rows(size):
    """Equal keys and beta near 2: powers of L reach 1e70, the inverse stays below 2."""
    lower = np.tril(np.full((1, size, size), 1.9), -1)
    got = invert(jnp.asarray(lower, jnp.float32))
    assert_allclose(got, np.linalg.inv(np.eye(size) + lower), rtol=0, atol=2e-5)


def test_diagonal_and_upper_triangle_are_not_read():
    lower = _lower(40)
    garbage = lower + np.triu(np.full_like(lower, 7.0))
    rhs = np.ones((2, 3, 40, 4), np.float32)
    args = [jnp.asarray(x, jnp.float32) for x in (lower, garbage)]
    clean, dirty = (np.asarray(invert(x)) for x in args)
    assert np.array_equal(clean, dirty)
    assert np.array_equal(clean, np.tril(clean))
    assert np.array_equal(*(np.asarray(solve(x, rhs)) for x in args))


@pytest.mark.parametrize("size", [5, 33])
def test_gradients_equal_the_library_on_a_single_matrix(size):
    rng = np.random.default_rng(1)
    lower, rhs = _lower(size, batch=()), rng.standard_normal((size, 3))
    weight, square = rng.standard_normal((size, 3)), rng.standard_normal((size, size))

    def library(lower, rhs):
        unit = jnp.eye(size) + jnp.tril(lower, -1)
        return jax.scipy.linalg.solve_triangular(unit, rhs, lower=True)

    @functools.partial(jax.jit, **QUICK)
    def gradients(lower, rhs):
        def by(solve, invert):
            loss = lambda *a: jnp.sum(solve(*a) * weight) + jnp.sum(invert(a[0]) * square)  # noqa: E731
            return jax.grad(loss, (0, 1))(lower, rhs)

        eye = jnp.eye(size)
        return by(solve_unit_lower, invert_unit_lower), by(library, lambda x: library(x, eye))

    with jax.enable_x64(True):
        got, want = gradients(jnp.asarray(lower), jnp.asarray(rhs))
    for a, b in zip(got, want, strict=True):
        assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        assert np.abs(b).max() > 0.1


def test_vmap_equals_leading_axes():
    lower = jnp.asarray(_lower(20, batch=(4, 2)), jnp.float32)
    rhs = jnp.asarray(np.random.default_rng(2).standard_normal((4, 2, 20, 3)), jnp.float32)
    gradient = jax.grad(lambda *a: jnp.sum(solve_unit_lower(*a) ** 2), (0, 1))
    both = jax.jit(lambda *a: (jax.vmap(gradient)(*a), gradient(*a)), **QUICK)
    by_row, at_once = both(lower, rhs)
    for a, b in zip(by_row, at_once, strict=True):
        assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_library_triangular_solve():
    """It deadlocks on CPU when batched (jaxlib 0.10.2)."""
    lower, rhs = jnp.zeros((3, 40, 40)), jnp.zeros((3, 40, 2))
    loss = lambda lower, rhs: jnp.sum(solve_unit_lower(lower, rhs))  # noqa: E731
    assert "triangular_solve" not in str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(lower, rhs))


def test_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"must be square .*got shape \(3, 4\)"):
        invert_unit_lower(jnp.zeros((3, 4)))
