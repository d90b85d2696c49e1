"""Frozen weights in blocks of 8 or 4 bits a value, each block with its own scale.

Offered: `QuantizedArray`, quantising, and the dense values of all or of a part.
"""

from tptt_jax.ops.quantization.array import (
    QuantizedArray,
    Weight,
    dense,
    slice_weight,
    take_entry,
    take_weight,
)
from tptt_jax.ops.quantization.blocks import are_finite, count_blocks, quantize, stored_shapes
from tptt_jax.ops.quantization.formats import (
    PACKED,
    SCALE_DTYPES,
    TABLE_FORMAT,
    BaseDtype,
    BlockFormat,
)

__all__ = [
    "PACKED",
    "SCALE_DTYPES",
    "TABLE_FORMAT",
    "BaseDtype",
    "BlockFormat",
    "QuantizedArray",
    "Weight",
    "are_finite",
    "count_blocks",
    "dense",
    "quantize",
    "slice_weight",
    "stored_shapes",
    "take_entry",
    "take_weight",
]
