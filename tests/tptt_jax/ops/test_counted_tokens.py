import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tptt_jax.ops.counted_tokens import map_counted

X = jnp.arange(1.0, 29).reshape(2, 7, 2)
FEW = jnp.array([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 0]], bool)


@pytest.mark.parametrize(
    ("counts", "size", "blocks"),
    [
        (FEW, 1, 3),
        (FEW, 2, 2),
        (FEW, 3, 1),
        (FEW, 100, 1),
        (jnp.zeros_like(FEW), 2, 0),
        (jnp.ones_like(FEW), 3, 3),
    ],
    ids=["one", "two", "three", "more than there are", "none count", "all count"],
)
def test_blocks_hold_what_counts_and_no_others_are_computed(counts, size, blocks):
    seen = []

    def run(x, number):
        jax.debug.callback(lambda x: seen.append(x), x)
        return 3 * x, number[..., None] + 1

    found = jax.jit(lambda *arrays: map_counted(run, arrays[:2], arrays[2], size))(
        X, jnp.arange(14).reshape(2, 7), counts
    )
    jax.effects_barrier()
    assert len(seen) == blocks
    np.testing.assert_array_equal(found[0], jnp.where(counts[..., None], 3 * X, 0))
    numbers = jnp.where(counts, jnp.arange(1, 15).reshape(2, 7), 0)
    np.testing.assert_array_equal(found[1][..., 0], numbers)
