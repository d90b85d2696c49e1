"""The formats of a quantised base: sizes of their blocks, and NF4's table."""

from typing import Literal

import numpy as np

BaseDtype = Literal["int8", "int4", "nf4"]
"""The format of a model's quantised matrices."""
BlockFormat = BaseDtype
"""The format of one matrix."""

BLOCK_SIZES: dict[BlockFormat, int] = {"int8": 32, "int4": 32, "nf4": 64}
"""Values that share a scale. Blocks of int8 are those of GGUF's Q8_0, blocks of int4 its Q4_1."""
PACKED: tuple[BlockFormat, ...] = ("int4", "nf4")
"""Formats that keep two codes in a byte, as uint8; the others are int8."""
SCALE_DTYPES: dict[BlockFormat, type[np.generic]] = {
    "int8": np.float16,
    "int4": np.uint32,
    "nf4": np.float16,
}
"""Scales of int4 are pairs of float16, the step in the low bits and the least value in the high."""
TABLE_FORMAT: BlockFormat = "int8"
"""The format of the embedding and the head in any quantised base: every logit and every hidden
state gets their error directly, and 4 bits are too coarse for them."""

# Quantiles of a normal distribution, scaled to [-1, 1] (arXiv:2305.14314, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
