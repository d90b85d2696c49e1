"""Values to blocks of codes and back.

A matrix is cut into blocks along the axis that products sum over: the last but one of a kernel
[..., I, O], the last of a table [..., V, E]. Codes keep the blocks as an axis of their own, so that
codes, scales and values are divided among devices alike.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array
from tptt_jax.ops.quantization.formats import BLOCK_SIZES, NF4, PACKED, BlockFormat

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

# Between neighbouring entries of the table.
_BOUNDS = (NF4[1:] + NF4[:-1]) / 2
_LARGEST = 127
# Steps between the least and the largest value of a block of int4.
_STEPS = 15


def count_blocks(size: int, format: BlockFormat) -> int:
    """Blocks that an axis of this size is cut into; the last one is filled up with zeros."""
    return -(-size // BLOCK_SIZES[format])


def stored_shapes(
    shape: tuple[int, ...], format: BlockFormat, axis: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and the scales of a matrix.

    Args:
      shape: of the matrix.
      format: of its blocks.
      axis: that is cut into n blocks of b values, negative.

    Returns:
      [..., n, b, ...], with b / 2 bytes if two codes share one, and [..., n, ...].
    """
    place = len(shape) + axis
    before, after = shape[:place], shape[place + 1 :]
    blocks, size = count_blocks(shape[axis], format), BLOCK_SIZES[format]
    stored = size // 2 if format in PACKED else size
    return (*before, blocks, stored, *after), (*before, blocks, *after)


def quantize(x: AnyArray, format: BlockFormat, axis: int) -> tuple[AnyArray, AnyArray]:
    """The nearest codes of a matrix, and the scale of each block.

    int8 stores round(x / scale) with scale = max |x| / 127; int4 round((x - min x) / step) with
    step = (max x - min x) / 15; NF4 (arXiv:2305.14314, section 3) the index of the nearest entry of
    its table to x / max |x|. Of 4 bits two share a byte: the first half of a block is in the low
    bits. Scales are rounded to float16 before codes are chosen.

    Args:
      x: values, of NumPy or JAX; the result is of the same.
      format: of the blocks.
      axis: to cut into blocks, negative.

    Returns:
      Codes [..., n, b, ...], int8, or uint8 with b / 2 if two share a byte; scales [..., n, ...] of
      `SCALE_DTYPES`. A value too large for a scale makes it infinite, see `are_finite`.
    """
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    blocks = _cut(x.astype(np.float32), format, axis)
    if format == "int4":
        return _quantize_affine(blocks, axis)
    largest = xp.max(xp.abs(blocks), axis=axis)
    with np.errstate(over="ignore"):
        steps = _LARGEST if format == "int8" else 1
        scales = (largest / np.float32(steps)).astype(np.float16)
    relative = _divide(blocks, xp.expand_dims(scales.astype(np.float32), axis))
    if format == "int8":
        codes = xp.clip(xp.rint(relative), -_LARGEST, _LARGEST).astype(np.int8)
        return codes, scales
    codes = xp.zeros(relative.shape, np.uint8)
    for bound in _BOUNDS:
        codes = codes + (relative > bound).astype(np.uint8)
    return _pack(codes, axis), scales


def _quantize_affine(blocks: AnyArray, axis: int) -> tuple[AnyArray, AnyArray]:
    """Codes of int4 and the two numbers of each block."""
    xp: Any = np if isinstance(blocks, np.ndarray) else jnp
    least, largest = xp.min(blocks, axis=axis), xp.max(blocks, axis=axis)
    with np.errstate(over="ignore", invalid="ignore"):
        step = ((largest - least) / np.float32(_STEPS)).astype(np.float16)
        least = least.astype(np.float16)
        wide_step, wide_least = (
            xp.expand_dims(each.astype(np.float32), axis) for each in (step, least)
        )
        codes = xp.clip(xp.rint(_divide(blocks - wide_least, wide_step)), 0, _STEPS)
        # NaN has no integer; its block is not finite and is refused.
        codes = xp.where(xp.isnan(codes), 0, codes).astype(np.uint8)
    low, high = (_bits(each).astype(np.uint32) for each in (step, least))
    return _pack(codes, axis), low | (high << 16)


def _divide(x: AnyArray, scale: AnyArray) -> AnyArray:
    """Relative values; 0 where the scale is 0."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    return xp.where(scale > 0, x / xp.where(scale > 0, scale, 1), 0)


def _pack(codes: AnyArray, axis: int) -> AnyArray:
    """Two codes of 4 bits in each byte."""
    xp: Any = np if isinstance(codes, np.ndarray) else jnp
    low, high = xp.split(codes, 2, axis=axis)
    return low | (high << 4)


def _bits(x: AnyArray) -> AnyArray:
    """float16 as uint16."""
    if isinstance(x, np.ndarray):
        return x.view(np.uint16)
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _step_and_least(scales: AnyArray) -> tuple[AnyArray, AnyArray]:
    """The two numbers of each block of int4, float16."""
    pair = (scales & 0xFFFF).astype(np.uint16), (scales >> 16).astype(np.uint16)
    if isinstance(scales, np.ndarray):
        return pair[0].view(np.float16), pair[1].view(np.float16)
    low, high = (jax.lax.bitcast_convert_type(each, jnp.float16) for each in pair)
    return low, high


def are_finite(scales: np.ndarray, format: BlockFormat) -> bool:
    """Whether all scales of a matrix are finite, and with them its values."""
    parts = _step_and_least(scales) if format == "int4" else (scales,)
    return all(bool(np.isfinite(part).all()) for part in parts)


def dequantize(
    codes: Array, scales: Array, format: BlockFormat, axis: int, size: int, dtype: DTypeLike
) -> Array:
    """The values that codes stand for.

    Args:
      codes: from `quantize`, also with more leading axes.
      scales: likewise.
      format: of the blocks.
      axis: that was cut, negative.
      size: its size; what fills up the last block is left out.
      dtype: of the result, which is computed in float32.
    """

    def spread(x: Array) -> Array:
        return jnp.expand_dims(x.astype(jnp.float32), axis)

    if format == "int4":
        step, least = map(spread, _step_and_least(scales))
        halves = jnp.concatenate([codes & 15, codes >> 4], axis=axis)
        values = halves.astype(jnp.float32) * step + least
    elif format == "int8":
        values = codes.astype(jnp.float32) * spread(scales)
    else:
        # Without a tie to the codes, a scan over layers would compute 16 constant matrices before
        # it starts, and keep them.
        codes, table = jax.lax.optimization_barrier((codes, jnp.asarray(NF4)))
        halves = [_look_up(codes & 15, table), _look_up(codes >> 4, table)]
        values = jnp.concatenate(halves, axis=axis) * spread(scales)
    place = values.ndim + axis
    before, after = values.shape[: place - 1], values.shape[place + 1 :]
    joined = values.reshape(*before, -1, *after)
    if joined.shape[axis] != size:
        joined = jax.lax.slice_in_dim(joined, 0, size, axis=joined.ndim + axis)
    return joined.astype(dtype)


def _cut(x: AnyArray, format: BlockFormat, axis: int) -> AnyArray:
    """[..., I, ...] -> [..., n, b, ...], filled up with zeros."""
    size, place = BLOCK_SIZES[format], x.ndim + axis
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    if missing := -x.shape[axis] % size:
        x = xp.pad(x, [(0, missing if each == place else 0) for each in range(x.ndim)])
    return x.reshape(*x.shape[:place], -1, size, *x.shape[place + 1 :])


def _look_up(codes: Array, table: Array) -> Array:
    """Entries of the table, chosen bit by bit: a gather takes ten times as long on a CPU."""
    values: list[Array] = list(table)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, upper, lower) for lower, upper in pairs]
    return values[0]
