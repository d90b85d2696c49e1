"""Rotary position embedding (arXiv:2104.09864), half-split, exact at any position."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.config import RopeConfig

_DIGIT_BITS = 8
_NUM_DIGITS = 4


class RotaryAngles(NamedTuple):
    """Every token's rotation, as factors on the channels of a head.

    Attributes:
      cos: of each channel itself [B, T, D].
      sin: of the channel D / 2 away [B, T, D]; in the first half it has a minus sign.
    """

    cos: Float[Array, "B T D"]
    sin: Float[Array, "B T D"]


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
      Factors, float32 [B, T, head_dim].
    """
    mask = (1 << _DIGIT_BITS) - 1
    angle = sum(
        jnp.asarray(table)[(positions >> (_DIGIT_BITS * place)) & mask]
        for place, table in enumerate(_digit_tables(config, head_dim))
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return RotaryAngles(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


def rotate(x: Float[Array, "B T H D"], angles: RotaryAngles | None) -> Float[Array, "B T H D"]:
    """Rotates channel i together with channel i + D / 2, in float32.

    Args:
      x: queries or keys [B, T, H, D].
      angles: of the same tokens; None leaves x as it is.

    Returns:
      [B, T, H, D] in x's dtype.
    """
    return x if angles is None else _rotate(x, angles)


@jax.custom_vjp
def _rotate(x: Array, angles: RotaryAngles) -> Array:
    """The gradient is the rotation back.

    Autodiff would pad halves and add them. On CPU XLA fuses that with all that made the
    gradient, and the loop branches at every element.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    half = x.shape[-1] // 2
    others = jnp.concatenate([wide[..., half:], wide[..., :half]], axis=-1)
    rotated = wide * angles.cos[:, :, None] + others * angles.sin[:, :, None]
    return rotated.astype(x.dtype)


def _rotate_forward(x: Array, angles: RotaryAngles) -> tuple[Array, RotaryAngles]:
    return _rotate(x, angles), angles


def _rotate_backward(angles: RotaryAngles, gradient: Array) -> tuple[Array, None]:
    return _rotate(gradient, RotaryAngles(angles.cos, -angles.sin)), None


_rotate.defvjp(_rotate_forward, _rotate_backward)
