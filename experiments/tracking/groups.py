"""Word problems of groups: the product of all elements so far."""

import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.array_typing import Array, Int

GroupName = Literal["parity", "s3", "s4", "s5"]

# Letters whose permutations form the group; parity is the group of two.
_LETTERS: dict[GroupName, int] = {"parity": 2, "s3": 3, "s4": 4, "s5": 5}


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
    elements = list(itertools.permutations(range(_LETTERS[name])))
    number = {element: i for i, element in enumerate(elements)}
    return np.array(
        [[number[tuple(second[x] for x in first)] for second in elements] for first in elements]
    )


def draw_words(key: Array, table: Int[Array, "G G"], *, batch_size: int, length: int) -> Words:
    """Random words of uniformly distributed elements.

    Args:
      key: of the random numbers.
      table: from `multiplication_table`.
      batch_size: B.
      length: T.
    """
    elements = jax.random.randint(key, (length, batch_size), 0, len(table))

    def multiply(product: Array, element: Array) -> tuple[Array, Array]:
        product = table[product, element]
        return product, product

    _, products = jax.lax.scan(multiply, jnp.zeros_like(elements[0]), elements)
    return Words(elements.T, products.T)
