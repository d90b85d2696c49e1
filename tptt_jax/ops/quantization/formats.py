"""The formats of a quantised base: sizes of their blocks, and NF4's table."""

from typing import Literal

import numpy as np

BaseDtype = Literal["int8", "nf4"]
"""The format of a model's quantised matrices."""
BlockFormat = BaseDtype
"""The format of one matrix."""

BLOCK_SIZES: dict[BlockFormat, int] = {"int8": 32, "nf4": 64}
"""Values that share a scale. Blocks of int8 are those of GGUF's Q8_0."""

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


def table_format(base_dtype: BaseDtype) -> BlockFormat:
    """The format of the embedding and the head in a base of this format: always int8.

    Every logit and every hidden state gets their error directly, so NF4 is too coarse for them.
    """
    del base_dtype
    return "int8"
