"""A quantised matrix as one value, and what products need of it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array
from tptt_jax.ops.quantization.blocks import dequantize
from tptt_jax.ops.quantization.formats import BlockFormat


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A matrix, or a stack of them, in blocks; a tree of two arrays.

    Attributes:
      codes: see `quantize`.
      scales: likewise.
      format: of the blocks.
      axis: that is cut into blocks, -1 or -2.
      length: of that axis.
    """

    # Any: trees of shapes, shardings and the like are of this class, too.
    codes: Any
    scales: Any
    format: BlockFormat = field(metadata={"static": True})
    axis: int = field(metadata={"static": True})
    length: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        shape = list(self.scales.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The matrix in a dtype."""
        return dequantize(self.codes, self.scales, self.format, self.axis, self.length, dtype=dtype)

    def map_axis(self, axis: int, run: Callable[[Array, int], Array]) -> "QuantizedArray":
        """run(array, axis) of the parts, for an axis of the matrix that is not cut into blocks."""
        assert axis - self.scales.ndim != self.axis, "blocks are not taken apart"
        # Codes have the values of a block as an axis more, after the blocks.
        extra = 1 if self.axis == -2 and axis == self.scales.ndim - 1 else 0
        codes, scales = run(self.codes, axis + extra), run(self.scales, axis)
        return dataclasses.replace(self, codes=codes, scales=scales)


Weight = jax.Array | QuantizedArray
"""A matrix as it is stored."""


def dense(weight: Weight, dtype: DTypeLike) -> Array:
    """A matrix in a dtype, wherever it is used: quantised ones exist in it only there."""
    if isinstance(weight, QuantizedArray):
        return weight.dequantize(dtype)
    return weight.astype(dtype)


def take_entry(stack: Any, index: Array) -> Any:
    """One matrix of a stack [X, ...], or one entry of a tree of arrays."""
    # A slice, which products read in place; stack[index] would be a gather.
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), stack)


def slice_weight(weight: Weight, start: Array | int, count: int, axis: int) -> Weight:
    """`count` neighbouring entries of an axis that is not cut into blocks."""

    def run(x: Array, axis: int) -> Array:
        return lax.dynamic_slice_in_dim(x, start, count, axis)

    return weight.map_axis(axis, run) if isinstance(weight, QuantizedArray) else run(weight, axis)


def take_weight(weight: Weight, indices: Array, axis: int) -> Weight:
    """Some entries [M] of an axis that is not cut into blocks."""

    def run(x: Array, axis: int) -> Array:
        return jnp.take(x, indices, axis)

    return weight.map_axis(axis, run) if isinstance(weight, QuantizedArray) else run(weight, axis)
