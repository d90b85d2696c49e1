"""Quantising a model's matrices while they are loaded, part by part."""

from math import prod

import numpy as np
from flax import nnx

from tptt_jax.layers.quantized import QuantizedWeight
from tptt_jax.ops.quantization import PACKED, SCALE_DTYPES, quantize, stored_shapes

_ELEMENTS_AT_ONCE = 1 << 20


def quantized_weights(model: nnx.Module) -> dict[str, QuantizedWeight]:
    """The quantised matrices of a model, abstract or not, by dot-joined path."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedWeight)
    }


def quantize_tensor(array: np.ndarray, weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """A stored matrix in blocks; beside it, memory holds a few megabytes at a time.

    Args:
      array: of any float dtype, [..., I, O] or [..., V, E].
      weight: what it is for; its own values are not read.

    Returns:
      Codes and scales, as `tptt_jax.ops.quantization.quantize` returns them.
    """
    shapes = stored_shapes(array.shape, weight.format, weight.axis)
    codes = np.empty(shapes[0], np.uint8 if weight.format in PACKED else np.int8)
    scales = np.empty(shapes[1], SCALE_DTYPES[weight.format])
    # Along the axis that is not cut into blocks: the last, or the one before it.
    axis = -1 if weight.axis == -2 else -2
    rows = array.shape[axis]
    step = max(1, _ELEMENTS_AT_ONCE * rows // max(1, prod(array.shape)))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        own = (..., part) if axis == -1 else (..., part, slice(None))
        of_codes = own if axis == -1 else (*own, slice(None))
        codes[of_codes], scales[own] = quantize(array[own], weight.format, weight.axis)
    return codes, scales
