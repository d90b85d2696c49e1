"""Expands one token into several Householder steps (TPTT, arXiv:2506.17671, eq. 13)."""

import math

import jax.numpy as jnp

from tptt_jax.array_checks import check_axes
from tptt_jax.array_typing import Array, Float, SegmentIds
from tptt_jax.config import Trick
from tptt_jax.ops.token_shift import shift_tokens


def expand_virtual_tokens(
    x: Float[Array, "B T K D"],
    num_householder: int,
    trick: Trick,
    segment_ids: SegmentIds | None = None,
) -> Float[Array, "B T N K D"]:
    """Expands every token into `num_householder` virtual tokens.

    Virtual token m = 0 .. N-1 of token t is, by trick,

    - "derivative": 2^-m times the m-th backward difference at t over the document's valid
      tokens (x_t, (x_t - x_{t-1}) / 2, (x_t - 2 x_{t-1} + x_{t-2}) / 4, ...); tokens before
      the document are zero;
    - "rotary": x_t with every pair of channels (0, 1), (2, 3), ... rotated by 2 pi m / N; an
      odd last channel stays;
    - "combined": the mean of both.

    Virtual tokens of padding are meaningless.

    Args:
      x: keys or values [B, T, K, D].
      num_householder: N, at least 1; with 1 the result is x itself.
      trick: see above.
      segment_ids: document ids [B, T], 0 for padding; None: every row is one document.

    Returns:
      The virtual tokens [B, T, N, K, D] in x's dtype; differences are taken in at least
      float32.

    Raises:
      TypeError: if x is not an array.
      ValueError: if N < 1, x has other axes, or the trick is unknown.
    """
    check_axes("x", x, "B T K D")
    if num_householder < 1:
        raise ValueError(f"num_householder must be at least 1, got {num_householder}.")
    if trick not in ("derivative", "rotary", "combined"):
        raise ValueError(f"trick must be one of derivative, rotary, combined, got {trick!r}.")
    if num_householder == 1:
        return x[:, :, None]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if trick == "derivative":
        steps = _derivatives(wide, num_householder, segment_ids)
    elif trick == "rotary":
        steps = _rotations(wide, num_householder)
    else:
        derivatives = _derivatives(wide, num_householder, segment_ids)
        rotations = _rotations(wide, num_householder)
        steps = [(a + b) / 2 for a, b in zip(derivatives, rotations, strict=True)]
    return jnp.stack(steps, axis=2).astype(x.dtype)


def _derivatives(x: Array, count: int, segment_ids: SegmentIds | None) -> list[Array]:
    steps = [x]
    for _ in range(count - 1):
        previous, _ = shift_tokens(steps[-1], 1, segment_ids)
        steps.append((steps[-1] - previous) / 2)
    return steps


def _rotations(x: Array, count: int) -> list[Array]:
    paired = x.shape[-1] // 2 * 2
    even, odd, rest = x[..., 0:paired:2], x[..., 1:paired:2], x[..., paired:]
    steps = [x]
    for m in range(1, count):
        cos, sin = math.cos(2 * math.pi * m / count), math.sin(2 * math.pi * m / count)
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        steps.append(jnp.concatenate([rotated.reshape(*x.shape[:-1], paired), rest], axis=-1))
    return steps
