import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts import assert_close, quick_jit
from tptt_jax.ops.grouped_matmul import OwnGroups, group_rows, grouped_matmul


def draw(rows, groups, seed=0, sizes=(6, 5)):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, sizes[0])), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((groups, *sizes)), jnp.float32)
    # Uneven on purpose: some groups get nothing, one gets many.
    of_row = jnp.asarray(np.minimum(rng.geometric(0.3, rows) - 1, groups - 1), jnp.int32)
    return x, weights, of_row


def product(x, weights, of_row):
    return grouped_matmul(x, weights, group_rows(of_row, weights.shape[0]))


def oracle(x, weights, of_row):
    return jnp.einsum("mi,mio->mo", x, weights[of_row], precision="highest")


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (1, 4), (9, 9), (40, 3)])
def test_every_row_meets_its_matrix(rows, groups):
    compiled = quick_jit(product), quick_jit(oracle)
    for seed in range(5):
        got, want = (function(*draw(rows, groups, seed)) for function in compiled)
        assert_close(got, want, 1e-6, f"rows of seed {seed}")


@pytest.mark.parametrize(("rows", "groups"), [(1, 4), (37, 5), (600, 3)])
def test_gradients(rows, groups):
    x, weights, of_row = draw(rows, groups)
    target = jnp.cos(jnp.arange(rows * 5.0)).reshape(rows, 5)

    def gradients(function):
        def loss(x, w):
            return jnp.sum(function(x, w, of_row) * target)

        return quick_jit(jax.grad(loss, (0, 1)))(x, weights)

    for got, want in zip(gradients(product), gradients(oracle), strict=True):
        assert_close(got, want, 1e-5, "gradient")


def test_the_work_is_that_of_the_rows():
    """A product with all matrices would take 16 times the rows' work."""
    x, weights, of_row = draw(512, 16, sizes=(64, 32))
    grouping = jax.jit(group_rows, static_argnums=1)(of_row, 16)
    assert grouping.num_slots <= 2 * 512
    used = np.asarray(grouping.slots) // (grouping.num_slots // len(grouping.groups))
    np.testing.assert_array_equal(np.asarray(grouping.groups)[used], of_row)
    assert len(set(np.asarray(grouping.slots).tolist())) == 512
    assert_close(product(x, weights, of_row), oracle(x, weights, of_row), 1e-5, "rows")


def test_bfloat16():
    x, weights, of_row = draw(20, 3)
    got = product(x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16), of_row)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), oracle(x, weights, of_row), 2e-2, "rows")


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 3), (4, 1)])
def test_own_groups_give_their_rows_and_no_others(first, count):
    """What devices with some of the matrices compute adds up; they multiply only their rows."""
    x, weights, of_row = draw(37, 5)
    is_own = (of_row >= first) & (of_row < first + count)
    target = jnp.cos(jnp.arange(37 * 5.0)).reshape(37, 5)
    grouping = group_rows(of_row, 5, OwnGroups(jnp.int32(first), count))
    block = grouping.num_slots // len(grouping.groups)
    assert grouping.used <= is_own.sum() // block + count

    def own(x, weights):
        return jnp.sum(grouped_matmul(x, weights[first : first + count], grouping) * target)

    def expected(x, weights):
        return jnp.sum(jnp.where(is_own[:, None], oracle(x, weights, of_row), 0) * target)

    pairs = zip(*(jax.grad(f, (0, 1))(x, weights) for f in (own, expected)), strict=True)
    for got, want in pairs:
        assert_close(got, want, 1e-5, "gradient")
    assert_close(own(x, weights), expected(x, weights), 1e-5, "product")
