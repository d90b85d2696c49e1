"""Rotary position embedding (arXiv:2104.09864), half-split, exact at any position."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.config import RopeConfig

_DIGIT_BITS = 8
_NUM_DIGITS = 4


class RotaryAngles(NamedTuple):
    """Cosine and sine of every token's rotation."""

    cos: Float[Array, "B T half_D"]
    sin: Float[Array, "B T half_D"]


def rotary_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angles per token of distance, in radians.

    Args:
      config: base and scaling; "llama3" follows the Llama 3.1 release.
      head_dim: even.

    Returns:
      float64 [head_dim / 2], decreasing.
    """
    frequencies = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "llama3":
        turns = config.original_max_positions * frequencies / (2 * math.pi)
        span = config.high_freq_factor - config.low_freq_factor
        keep = np.clip((turns - config.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / config.factor)
    return frequencies


@functools.lru_cache(maxsize=64)
def _digit_tables(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, ...]:
    frequencies = rotary_frequencies(config, head_dim)
    digits = np.arange(1 << _DIGIT_BITS, dtype=np.float64)[:, None]
    return tuple(
        np.mod(digits * (1 << (_DIGIT_BITS * place)) * frequencies, 2 * math.pi).astype(np.float32)
        for place in range(_NUM_DIGITS)
    )


def rotary_angles(positions: Int[Array, "B T"], config: RopeConfig, head_dim: int) -> RotaryAngles:
    """The rotation of every token, right to 4e-6 rad at any position an int32 can hold.

    ``position * frequency`` in float32 is off by 0.06 rad at a million tokens. Here
    the position is cut into base-256 digits, and the angle of each digit comes from
    a table made on the host in float64 and reduced modulo 2 pi.

    Args:
      positions: [B, T] in tokens.
      config: base and scaling of the layer.
      head_dim: even.

    Returns:
      Cosine and sine, float32 [B, T, head_dim / 2].
    """
    mask = (1 << _DIGIT_BITS) - 1
    angle = sum(
        jnp.asarray(table)[(positions >> (_DIGIT_BITS * place)) & mask]
        for place, table in enumerate(_digit_tables(config, head_dim))
    )
    return RotaryAngles(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B T H D"], angles: RotaryAngles | None) -> Float[Array, "B T H D"]:
    """Rotates channel i together with channel i + D / 2, in float32.

    Args:
      x: queries or keys [B, T, H, D].
      angles: of the same tokens; None leaves x as it is.

    Returns:
      [B, T, H, D] in x's dtype.
    """
    if angles is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    halves = wide.reshape(*x.shape[:-1], 2, -1)
    cos, sin = angles.cos[:, :, None, None], angles.sin[:, :, None, None]
    # Turned around, not taken apart and joined: XLA's loop over the latter branches at every
    # element on CPU.
    sign = jnp.array([[-1.0], [1.0]], wide.dtype)
    rotated = halves * cos + jnp.flip(halves, axis=-2) * (sign * sin)
    return rotated.reshape(x.shape).astype(x.dtype)
