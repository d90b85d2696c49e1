"""Frozen weights in blocks of 8-bit integers or 4-bit quantiles, each block with its own scale."""

from tptt_jax.ops.quantization.array import (
    QuantizedArray,
    Weight,
    dense,
    slice_weight,
    take_entry,
    take_weight,
)
from tptt_jax.ops.quantization.blocks import count_blocks, quantize, stored_shapes
from tptt_jax.ops.quantization.formats import BaseDtype, BlockFormat, table_format

__all__ = [
    "BaseDtype",
    "BlockFormat",
    "QuantizedArray",
    "Weight",
    "count_blocks",
    "dense",
    "quantize",
    "slice_weight",
    "stored_shapes",
    "table_format",
    "take_entry",
    "take_weight",
]
