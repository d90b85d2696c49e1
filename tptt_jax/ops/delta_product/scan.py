"""The part of the chunkwise DeltaProduct that is sequential: the state from chunk to chunk."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float
from tptt_jax.ops.delta_product.inputs import activate_state
from tptt_jax.ops.manual_axes import vary_along, varying_axes


class ChunkTerms(NamedTuple):
    """Terms by which chunks update and read a state; leading axes [n chunks, B, K] throughout.

    M virtual tokens write, R queries (all of a group) read.

    Attributes:
      key_in: keys that read the old state before writing [..., M, D].
      query_in: queries that read the old state [..., R, D].
      key_out: keys along which values are written [..., M, D].
      scores: weights of the chunk's own writes in its reads [..., R, M].
      value: target values at key_in [..., M, Dv].
      lower: L of the triangular system [..., M, M], strictly lower; receives its gradient.
      inverse: (I + L)^-1 [..., M, M]; receives none.
      gate: factor on writes [..., M]; None: it is in the other terms.
      keep: factor on the old state [..., 1, 1]; None: 1.
      is_complete: whether the state is activated after the chunk [n]; None: never.
    """

    key_in: Float[Array, "N B K M D"]
    query_in: Float[Array, "N B K R D"]
    key_out: Float[Array, "N B K M D"]
    scores: Float[Array, "N B K R M"]
    value: Float[Array, "N B K M Dv"]
    lower: Float[Array, "N B K M M"]
    inverse: Float[Array, "N B K M M"]
    gate: Float[Array, "N B K M"] | None
    keep: Float[Array, "N B K 1 1"] | None
    is_complete: Bool[Array, "N"] | None


def scan_chunks(
    state: Float[Array, "B K D Dv"], terms: ChunkTerms, precision: jax.lax.PrecisionLike
) -> tuple[Float[Array, "B K D Dv"], Float[Array, "N B K R Dv"]]:
    """Runs S <- keep S + key_out^T X, out = query_in S + scores X, X from key_in S.

    X solves (I + L) X = gate (value - key_in S). The gradient recomputes the states, then runs the
    chunks backwards; both loops contain only what depends on the neighbouring chunk, everything
    else is one product for all chunks.

    Args:
      state: before the first chunk [B, K, D, Dv].
      terms: of the chunks.
      precision: of the products but for that with the inverse, which is exact.

    Returns:
      The state after the last chunk; the reads [n, B, K, R, Dv].
    """
    return _scan(state, terms, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(state: Array, terms: ChunkTerms, precision: jax.lax.PrecisionLike) -> tuple[Array, Array]:
    matmul = functools.partial(jnp.matmul, precision=precision)
    size, dim = terms.key_in.shape[-2:]
    # Two products with the state, or with the solution, are one.
    readers = jnp.concatenate([terms.key_in, terms.query_in], axis=-2)
    writers = jnp.concatenate([_transpose(terms.key_out), terms.scores], axis=-2)

    def carry(state, chunk):
        readers, writers, value, inverse, gate, keep, is_complete = chunk
        read = matmul(readers, state)
        written = matmul(writers, _solve(inverse, _gated(value - read[..., :size, :], gate)))
        after = _update(state, written[..., :dim, :], keep, is_complete)
        return after, read[..., size:, :] + written[..., dim:, :]

    others = (terms.value, terms.inverse, terms.gate, terms.keep, terms.is_complete)
    return jax.lax.scan(carry, state, (readers, writers, *others))


def _scan_forward(
    state: Array, terms: ChunkTerms, precision: jax.lax.PrecisionLike
) -> tuple[tuple[Array, Array], tuple[Array, ChunkTerms]]:
    return _scan(state, terms, precision), (state, terms)


def _scan_backward(
    precision: jax.lax.PrecisionLike,
    kept: tuple[Array, ChunkTerms],
    gradients: tuple[Array, Array],
) -> tuple[Array, ChunkTerms]:
    first, terms = kept
    grad_last, grad_out = gradients
    matmul = functools.partial(jnp.matmul, precision=precision)
    key_in, query_in, key_out, scores, _, _, inverse, gate, keep, is_complete = terms

    states, missing, solution = _recompute_states(first, terms, matmul)
    from_scores = matmul(_transpose(scores), grad_out)
    from_queries = matmul(_transpose(query_in), grad_out)

    def run_backward(grad_after, chunk):
        key_in, key_out, inverse, gate, keep, is_complete, from_scores, from_queries, rest = chunk
        if is_complete is not None:
            state, solution = rest
            before = _kept(state, keep) + matmul(_transpose(key_out), solution)
            grad_after = _activation_gradient(grad_after, before, is_complete)
        grad_solution = matmul(key_out, grad_after) + from_scores
        grad_written = _solve(_transpose(inverse), grad_solution)
        back = matmul(_transpose(key_in), _gated(grad_written, gate))
        return _kept(grad_after, keep) - back + from_queries, (grad_after, grad_written)

    rest = None if is_complete is None else (states, solution)
    xs = (key_in, key_out, inverse, gate, keep, is_complete, from_scores, from_queries, rest)
    grad_first, (grad_after, grad_written) = jax.lax.scan(run_backward, grad_last, xs, reverse=True)

    grad_value = _gated(grad_written, gate)
    # Again two products at a time.
    size = key_in.shape[-2]
    reads = jnp.concatenate([-grad_value, grad_out], axis=-2)
    grad_readers = matmul(reads, _transpose(states))
    outer = matmul(jnp.concatenate([-grad_written, grad_out], axis=-2), _transpose(solution))
    contract = functools.partial(jnp.einsum, precision="highest")
    grad_terms = ChunkTerms(
        key_in=grad_readers[..., :size, :],
        query_in=grad_readers[..., size:, :],
        key_out=matmul(solution, _transpose(grad_after)),
        scores=outer[..., size:, :],
        value=grad_value,
        lower=jnp.tril(outer[..., :size, :], -1),
        inverse=vary_along(jnp.zeros_like(inverse), varying_axes(inverse)),
        gate=None if gate is None else contract("...mx,...mx->...m", grad_written, missing),
        keep=None
        if keep is None
        else contract("...xy,...xy->...", grad_after, states)[..., None, None],
        is_complete=None,
    )
    return grad_first, grad_terms


def _recompute_states(
    first: Array, terms: ChunkTerms, matmul: Callable[[Array, Array], Array]
) -> tuple[Array, Array, Array]:
    """States before the chunks, residuals of their reads, and solutions of their systems."""

    def carry(state, chunk):
        key_in, key_out, value, inverse, gate, keep, is_complete = chunk
        missing = value - matmul(key_in, state)
        solution = _solve(inverse, _gated(missing, gate))
        after = _update(state, matmul(_transpose(key_out), solution), keep, is_complete)
        return after, (state, missing, solution)

    key_in, _, key_out, _, value, _, *others = terms
    return jax.lax.scan(carry, first, (key_in, key_out, value, *others))[1]


_scan.defvjp(_scan_forward, _scan_backward)


def _solve(inverse: Array, rhs: Array) -> Array:
    return jnp.matmul(inverse, rhs, precision="highest")


def _gated(x: Array, gate: Array | None) -> Array:
    return x if gate is None else x * gate[..., None]


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _kept(state: Array, keep: Array | None) -> Array:
    return state if keep is None else keep * state


def _update(state: Array, written: Array, keep: Array | None, is_complete: Array | None) -> Array:
    after = _kept(state, keep) + written
    if is_complete is None:
        return after
    return jnp.where(is_complete, activate_state(after), after)


def _activation_gradient(grad: Array, before: Array, is_complete: Array) -> Array:
    """The gradient of the state before it was activated, if it was."""
    _, pull = jax.vjp(activate_state, before)
    return jnp.where(is_complete, pull(grad)[0], grad)
