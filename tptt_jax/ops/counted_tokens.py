"""Work for the tokens that count, and for no others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array, Bool


def map_counted(
    run: Callable[..., Any], arrays: tuple[Any, ...], counts: Bool[Array, "B T"], size: int
) -> Any:
    """`run` on blocks of tokens, until each token that counts was in one; zeros for all others.

    In each row the tokens that count come first, in their order. Not to be differentiated: how
    many blocks there are is known when the program runs.

    Args:
      run: takes a block [B, size, ...] of each array and gives arrays [B, size, ...].
      arrays: [B, T, ...].
      counts: which tokens count.
      size: tokens of a row in a block.
    """
    length = counts.shape[1]
    order = jnp.argsort(~counts, axis=1, stable=True)
    padded = jnp.pad(order, ((0, 0), (0, -length % size)))

    def block(number: Array | int) -> tuple[Any, ...]:
        places = lax.dynamic_slice_in_dim(padded, number * size, size, axis=1)
        return jax.tree.map(lambda x: _take(x, places), arrays)

    def visit(number: Array, results: Any) -> Any:
        return jax.tree.map(
            lambda x, part: lax.dynamic_update_slice_in_dim(x, part, number * size, axis=1),
            results,
            run(*block(number)),
        )

    shapes = jax.eval_shape(lambda: run(*block(0)))
    results = jax.tree.map(lambda x: jnp.zeros((*padded.shape, *x.shape[2:]), x.dtype), shapes)
    blocks = (jnp.max(jnp.sum(counts, axis=1)) + size - 1) // size
    results = lax.fori_loop(0, blocks, visit, results)
    places = jnp.argsort(order, axis=1)

    def put_back(x: Array) -> Array:
        return jnp.where(_wide(counts, x), _take(x, places), 0)

    return jax.tree.map(put_back, results)


def _take(x: Array, places: Array) -> Array:
    return jnp.take_along_axis(x, _wide(places, x), axis=1)


def _wide(x: Array, like: Array) -> Array:
    """[B, T] with as many axes as `like`."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - 2))
