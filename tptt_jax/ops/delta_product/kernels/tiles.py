"""Operations of the kernels on the tiles of one chunk."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, Int, Shaped

_THREE_TF32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
_TF32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32
_CONTRACTED = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}

# Larger tiles multiply more zeros, smaller ones have too few rows.
_PART = 32

Form = Literal["nn", "nt", "tn"]


class Products(NamedTuple):
    """Precision of the products of tiles; every product is summed in float32.

    Attributes:
      dtype: to which numbers are rounded before products and writes.
      exact: whether float32 numbers keep all their bits (three TF32 products make one).
      interpret: whether JAX interprets the kernels, for tests on any machine; float32 products
        are then exact.
    """

    dtype: jnp.dtype
    exact: bool
    interpret: bool

    def dot(self, a: Array, b: Array, form: Form = "nn") -> Array:
        """Returns a b (nn), a b^T (nt) or a^T b (tn)."""
        return self._dot(a.astype(self.dtype), b.astype(self.dtype), form, self.exact)

    def exact_dot(self, a: Array, b: Array, form: Form = "nn") -> Array:
        """The same with all bits of float32, independent of `exact`."""
        return self._dot(a.astype(jnp.float32), b.astype(jnp.float32), form, True)

    def _dot(self, a: Array, b: Array, form: Form, exact: bool) -> Array:
        precision = None
        if a.dtype == jnp.float32:
            precision = _THREE_TF32 if exact else _TF32
            precision = jax.lax.Precision.HIGHEST if self.interpret else precision
        return jax.lax.dot_general(
            a, b, (_CONTRACTED[form], ((), ())), precision, preferred_element_type=jnp.float32
        )


class Cut(NamedTuple):
    """Chunk sizes of a row, and the precision of its products.

    Attributes:
      tokens: C of a chunk, a power of 2.
      steps: N, virtual tokens of a token, a power of 2.
      products: of tiles.
    """

    tokens: int
    steps: int
    products: Products

    @property
    def writes(self) -> int:
        """Virtual tokens M = C * N of a chunk."""
        return self.tokens * self.steps

    @property
    def part(self) -> int:
        """Virtual tokens of a tile of L that is inverted at once."""
        return min(_PART, self.writes)

    def written(self, part: slice = slice(None)) -> Int[Array, "M"]:
        """Virtual tokens, or a part of them."""
        start, stop, _ = part.indices(self.writes)
        return start + _iota(stop - start)

    def read(self) -> Int[Array, "C"]:
        """The last virtual token of each token, as rows."""
        return (_iota(self.tokens) + 1) * self.steps - 1


def scale(x: Float[Array, "R X"], factor: Float[Array, "R"] | Float[Array, "R X"]) -> Array:
    """Multiplies rows by a factor each, or each number by its own."""
    return x * (factor[:, None] if factor.ndim == 1 else factor)


def cross(
    rows: Shaped[Array, "R"], columns: Shaped[Array, "X"], transposed: bool = False
) -> tuple[Shaped[Array, "R 1"], Shaped[Array, "1 X"]]:
    """Spreads two vectors over a tile [R, X], or [X, R]."""
    if transposed:
        return rows[None, :], columns[:, None]
    return rows[:, None], columns[None, :]


def diagonal(x: Float[Array, "X X"]) -> Float[Array, "X X"]:
    """Keeps the diagonal."""
    row = _iota(x.shape[0])
    return jnp.where(row[:, None] == row[None, :], x, 0)


def decay_between(
    products: Products,
    decay: Float[Array, "M"],
    rows: Int[Array, "R"],
    columns: Int[Array, "X"],
    until: tuple[Float[Array, "R"], Float[Array, "X"]],
    *,
    transposed: bool = False,
) -> Float[Array, "R X"]:
    """Decay factor from virtual token j's write to a later row.

    Args:
      products: precision.
      decay: logarithm of each virtual token's factor on everything written before it [M].
      rows: the last virtual token whose decay applies to a row.
      columns: virtual tokens.
      until: sums of decays from the chunk's start to rows and to columns.
      transposed: whether the result is [X, R].
    """
    if not products.exact:
        of_row, of_column = cross(*until, transposed)
        return jnp.exp(jnp.minimum(of_row - of_column, 0))
    # Sums over the tokens in between: a difference of running sums would lose the small decays
    # after a large one.
    steps = _iota(decay.shape[0])
    row, step = cross(rows, steps, transposed)
    reached = (row >= step).astype(jnp.float32)
    step, column = cross(steps, columns, transposed)
    addends = jnp.where(step > column, cross(decay, columns, transposed)[0], 0)
    pair = (addends, reached) if transposed else (reached, addends)
    return jnp.exp(products.exact_dot(*pair))


def invert_unit_lower_tile(products: Products, lower: Float[Array, "M M"]) -> Float[Array, "M M"]:
    """(I + L)^-1 for strictly lower triangular L; M is a power of 2.

    Diagonal blocks are merged in pairs, [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]],
    from single entries on; all pairs of a size in two products. Nothing overflows, as powers of L
    would.
    """
    size = lower.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, lower.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, lower.shape, 1)
    inverse = (row == column).astype(jnp.float32)
    block = 1
    while block < size:
        same_pair = row // (2 * block) == column // (2 * block)
        corner = jnp.where(same_pair & (row // block > column // block), lower, 0)
        if block > 1:
            corner = products.exact_dot(inverse, products.exact_dot(corner, inverse))
        inverse -= corner
        block *= 2
    return inverse


def _iota(size: int) -> Int[Array, "X"]:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
