"""Word problems of groups: the product of all elements so far."""

import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.array_typing import Array, Int

GroupName = Literal["parity", "s3", "s4", "s5", "s5-2", "s5-3"]

# Letters whose permutations form the group; parity is the group of two.
_LETTERS: dict[GroupName, int] = {"parity": 2, "s3": 3, "s4": 4, "s5": 5, "s5-2": 5, "s5-3": 5}
# Letters that an element of a word may move, where that is not all (arXiv:2411.12537).
_MOVED: dict[GroupName, int] = {"s5-2": 2, "s5-3": 3}


class Words(NamedTuple):
    """Sequences of elements, and the product of each with all before it.

    Attributes:
      elements: [B, T], numbers below the group's size.
      products: [B, T], numbers below the group's size.
    """

    elements: Int[Array, "B T"]
    products: Int[Array, "B T"]


def multiplication_table(name: GroupName) -> Int[np.ndarray, "G G"]:
    """The product of element i and then element j; element 0 is the identity."""
    elements = _permutations(name)
    number = {element: i for i, element in enumerate(elements)}
    return np.array(
        [[number[tuple(second[x] for x in first)] for second in elements] for first in elements]
    )


def word_elements(name: GroupName) -> Int[np.ndarray, "M"]:
    """The elements that words are made of; their products reach the whole group."""
    elements = np.array(_permutations(name))
    moved = (elements != np.arange(elements.shape[1])).sum(axis=1)
    return np.flatnonzero(moved <= _MOVED.get(name, _LETTERS[name]))


def draw_words(
    key: Array,
    table: Int[Array, "G G"],
    used: Int[Array, "M"],
    *,
    batch_size: int,
    length: int,
) -> Words:
    """Random words of uniformly distributed elements.

    Args:
      key: of the random numbers.
      table: from `multiplication_table`.
      used: from `word_elements`.
      batch_size: B.
      length: T.
    """
    elements = used[jax.random.randint(key, (length, batch_size), 0, len(used))]

    def multiply(product: Array, element: Array) -> tuple[Array, Array]:
        product = table[product, element]
        return product, product

    _, products = jax.lax.scan(multiply, jnp.zeros_like(elements[0]), elements)
    return Words(elements.T, products.T)


def _permutations(name: GroupName) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(_LETTERS[name])))
