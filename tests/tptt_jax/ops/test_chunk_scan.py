"""The scan over chunks against the plain recurrence, and its gradient against autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tptt_jax.ops.delta_product.inputs import activate_state
from tptt_jax.ops.delta_product.scan import ChunkTerms, scan_chunks

CHUNKS, BATCH, HEADS, WRITERS, READERS, DIM, VALUE_DIM = 5, 2, 3, 6, 4, 8, 7


def make_terms(gate: bool, keep: bool, activated: bool) -> tuple[jax.Array, ChunkTerms]:
    generator = np.random.default_rng(0)

    def draw(*shape, lead=(CHUNKS, BATCH, HEADS)):
        # Larger ones grow from chunk to chunk until float32 is too coarse to compare with.
        return jnp.asarray(generator.normal(size=(*lead, *shape)) * 0.25, jnp.float32)

    lower = jnp.tril(draw(WRITERS, WRITERS), -1)
    complete = jnp.asarray([True, False, True, True, False]) if activated else None
    terms = ChunkTerms(
        key_in=draw(WRITERS, DIM),
        query_in=draw(READERS, DIM),
        key_out=draw(WRITERS, DIM),
        scores=draw(READERS, WRITERS),
        value=draw(WRITERS, VALUE_DIM),
        lower=lower,
        inverse=jnp.linalg.inv(jnp.eye(WRITERS) + lower),
        gate=jax.nn.sigmoid(draw(WRITERS)) if gate else None,
        keep=jax.nn.sigmoid(draw(1, 1)) if keep else None,
        is_complete=complete,
    )
    return draw(DIM, VALUE_DIM, lead=(BATCH, HEADS)), terms


def plain_scan(state: jax.Array, terms: ChunkTerms) -> tuple[jax.Array, jax.Array]:
    """One chunk after the other, with L inverted here so that it has a gradient."""
    outs = []
    for i in range(CHUNKS):
        term = jax.tree.map(lambda x, i=i: x[i], terms)
        missing = term.value - term.key_in @ state
        if term.gate is not None:
            missing = missing * term.gate[..., None]
        solution = jnp.linalg.inv(jnp.eye(WRITERS) + jnp.tril(term.lower, -1)) @ missing
        outs.append(term.query_in @ state + term.scores @ solution)
        state = state if term.keep is None else term.keep * state
        state = state + jnp.swapaxes(term.key_out, -1, -2) @ solution
        if term.is_complete is not None:
            state = jnp.where(term.is_complete, activate_state(state), state)
    return state, jnp.stack(outs)


options = pytest.mark.parametrize(
    ("gate", "keep", "activated"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, True)],
)


@options
def test_scan_is_the_recurrence(gate, keep, activated):
    inputs = make_terms(gate, keep, activated)
    for got, want in zip(scan_chunks(*inputs, "highest"), plain_scan(*inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@options
def test_gradient_is_autodiffs(gate, keep, activated):
    state, terms = make_terms(gate, keep, activated)
    fixed = {"inverse": terms.inverse, "is_complete": terms.is_complete}
    free = terms._replace(inverse=None, is_complete=None)

    def gradient(run, state, free):
        def loss(state, free):
            last, out = run(state, free._replace(**fixed))
            return jnp.sum(jnp.sin(last)) + jnp.sum(jnp.cos(out))

        return jax.grad(loss, (0, 1))(state, free)

    got = gradient(lambda *inputs: scan_chunks(*inputs, "highest"), state, free)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (state, free))
        want = gradient(plain_scan, *wide)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
