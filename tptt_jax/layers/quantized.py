"""Quantised weights of the pretrained model: frozen, and dense only where they are used."""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from tptt_jax.layers.parameters import BaseParam
from tptt_jax.ops.quantization import BaseDtype, BlockFormat, QuantizedArray, Weight, quantize


class QuantizedWeight(nnx.Module):
    """A matrix of the pretrained model in blocks; see `tptt_jax.ops.quantization`.

    Attributes:
      codes: [..., n, b, O] of a kernel [..., I, O], [..., V, n, b] of a table [..., V, E].
      scales: [..., n, O] or [..., V, n], of the format's dtype in `SCALE_DTYPES`.
      format: of the blocks.
      axis: that is cut into blocks: -2 of a kernel, -1 of a table.
      length: of that axis.
    """

    def __init__(self, weight: BaseParam, format: BlockFormat, axis: int) -> None:
        """Quantises a weight."""
        value = weight.get_value()
        codes, scales = quantize(value, format, axis)
        names = list(weight.get_metadata()["axes"])
        place = len(names) + axis
        # What lies along the axis is divided among devices block by block.
        self.codes = BaseParam(codes, axes=(*names[: place + 1], "block", *names[place + 1 :]))
        self.scales = BaseParam(scales, axes=tuple(names))
        self.format: BlockFormat = format
        self.axis, self.length = axis, value.shape[axis]

    def get_value(self) -> QuantizedArray:
        """The matrix as one value."""
        return QuantizedArray(
            self.codes[...], self.scales[...], self.format, self.axis, self.length
        )


StoredWeight = BaseParam | QuantizedWeight
"""What a layer holds of a matrix."""


def stored(weight: StoredWeight) -> Weight:
    """The matrix as it is stored."""
    return weight.get_value()


@runtime_checkable
class Quantizable(Protocol):
    """A module that has matrices to quantise."""

    def quantize_weights(self, base_dtype: BaseDtype) -> None:
        """Puts quantised weights in their place."""


def quantize_modules(root: nnx.Module, base_dtype: BaseDtype) -> None:
    """Quantises the matrices of a model's parts, in place; norms, biases and routers stay."""
    for _, module in list(nnx.iter_modules(root)):
        if isinstance(module, Quantizable):
            module.quantize_weights(base_dtype)


def count_parameters(model: nnx.Module, arrays: Any) -> int:
    """Values in the arrays of a model, or of a part of it that has all quantised weights.

    Args:
      model: whose quantised weights count as the matrices that they stand for.
      arrays: a tree of arrays.
    """
    count = sum(x.size for x in jax.tree.leaves(arrays))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, QuantizedWeight):
            value = module.get_value()
            count += value.size - value.codes.size - value.scales.size
    return count
