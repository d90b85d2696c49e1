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
      config: base and scaling; if they depend on the length of the text, those of short texts
        (see `RopeConfig.at_length`).
      head_dim: even.

    Returns:
      float64 [head_dim / 2].
    """
    frequencies = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "llama3":
        turns = config.original_max_positions * frequencies / (2 * math.pi)
        span = config.high_freq_factor - config.low_freq_factor
        keep = np.clip((turns - config.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / config.factor)
    if config.scaling == "yarn":
        keep = 1 - _yarn_ramp(config, head_dim)
        return frequencies * (keep + (1 - keep) / config.factor)
    if config.scaling == "longrope":
        return frequencies / np.asarray(config.short_factor, np.float64)
    return frequencies


def _yarn_ramp(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Stretch of each channel, 0 to 1 [head_dim / 2] (arXiv:2309.00071, eq. 18)."""

    def channel(turns: float) -> float:
        """The channel with this number of turns in the original context."""
        wavelength = config.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = channel(config.beta_fast), channel(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0  # as the paper's code does
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


@functools.lru_cache(maxsize=64)
def _digit_tables(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, ...]:
    frequencies = rotary_frequencies(config, head_dim)
    digits = np.arange(1 << _DIGIT_BITS, dtype=np.float64)[:, None]
    return tuple(
        np.mod(digits * (1 << (_DIGIT_BITS * place)) * frequencies, 2 * math.pi).astype(np.float32)
        for place in range(_NUM_DIGITS)
    )


def rotary_angles(
    positions: Int[Array, "B T"],
    config: RopeConfig,
    head_dim: int,
    lengths: Int[Array, "B T"] | int | None = None,
) -> RotaryAngles:
    """The rotation of every token, right to 4e-6 rad at any position an int32 can hold.

    ``position * frequency`` in float32 is off by 0.06 rad at a million tokens. Here
    the position is cut into base-256 digits, and the angle of each digit comes from
    a table made on the host in float64 and reduced modulo 2 pi. Only a "dynamic" base that depends
    on traced lengths is known too late for that: those angles are right to 3e-7 of themselves.

    Args:
      positions: [B, T] in tokens.
      config: base and scaling of the layer.
      head_dim: even.
      lengths: tokens of the text that each token belongs to [B, T], or of all texts, for scaling
        that depends on it; None: no text is longer than `config.original_max_positions`.

    Returns:
      Factors, float32 [B, T, head_dim], with the scaling's attention factor in them.
    """
    known = lengths if isinstance(lengths, int) else 0
    angle = _table_angles(positions, config.at_length(known, head_dim), head_dim)
    if isinstance(lengths, jax.Array) and config.depends_on_length:
        is_long = (lengths > config.original_max_positions)[..., None]
        angle = jnp.where(is_long, _long_angles(positions, config, head_dim, lengths), angle)
    cos, sin = (x * np.float32(config.attention_scale) for x in (jnp.cos(angle), jnp.sin(angle)))
    return RotaryAngles(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


def _table_angles(positions: Array, config: RopeConfig, head_dim: int) -> Array:
    mask = (1 << _DIGIT_BITS) - 1
    return sum(
        (
            jnp.asarray(table)[(positions >> (_DIGIT_BITS * place)) & mask]
            for place, table in enumerate(_digit_tables(config, head_dim))
        ),
        start=jnp.zeros((), jnp.float32),
    )


def _long_angles(positions: Array, config: RopeConfig, head_dim: int, lengths: Array) -> Array:
    """Angles [B, T, head_dim / 2] in texts beyond the trained length."""
    longest = config.original_max_positions
    if config.scaling == "longrope":
        fixed = config.at_length(longest + 1, head_dim)
        return _table_angles(positions, fixed, head_dim)
    growth = config.factor * (lengths.astype(jnp.float32) / longest - 1) + 1
    index = np.arange(head_dim // 2, dtype=np.float32)
    shrink = jnp.exp(jnp.log(growth)[..., None] * (-2 * index / (head_dim - 2)))
    plain = rotary_frequencies(config, head_dim).astype(np.float32)
    return positions.astype(jnp.float32)[..., None] * (plain * shrink)


def invert_rotation(angles: RotaryAngles, config: RopeConfig) -> RotaryAngles:
    """The inverse rotation, which also removes the attention factor."""
    scale = np.float32(config.attention_scale**-2)
    return RotaryAngles(angles.cos * scale, angles.sin * -scale)


def rotate(x: Float[Array, "B T H D"], angles: RotaryAngles | None) -> Float[Array, "B T H D"]:
    """Rotates channel i together with channel i + D / 2, in float32.

    Args:
      x: queries or keys [B, T, H, D].
      angles: of the same tokens; None leaves x unchanged.

    Returns:
      [B, T, H, D] in x's dtype.
    """
    return x if angles is None else _rotate(x, angles)


@jax.custom_vjp
def _rotate(x: Array, angles: RotaryAngles) -> Array:
    """Rotates x; its gradient is the inverse rotation.

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
