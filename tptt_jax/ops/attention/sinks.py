"""Sinks: the first tokens of a document, which stay visible behind a window."""

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, Int
from tptt_jax.ops.attention.blocks import KeyValues


def row_sinks(
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    queries: Float[Array, "B T H D"],
    count: int,
) -> KeyValues:
    """The first `count` tokens of rows that hold one document without padding.

    Args:
      k: rotated keys.
      v: values.
      queries: as they are rotated for sinks.
      count: of sinks.
    """
    tokens = k.shape[1]
    visible = jnp.arange(count) <= jnp.arange(tokens)[:, None]
    first = min(count, tokens)
    pad = ((0, 0), (0, count - first), (0, 0), (0, 0))
    keys, values = (jnp.pad(x[:, :first], pad) for x in (k, v))
    mask = jnp.broadcast_to(visible, (k.shape[0], *visible.shape))
    return KeyValues(keys, values, mask, queries)


def document_sinks(
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    queries: Float[Array, "B T H D"],
    starts: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    count: int,
    carried: tuple[Float[Array, "B Z K D"], Float[Array, "B Z K D"]] | None = None,
) -> KeyValues:
    """The first `count` tokens of each token's own document.

    Args:
      k: rotated keys.
      v: values.
      queries: as they are rotated for sinks.
      starts: place of the document's first token; negative: it lies before these tokens.
      valid: False on padding.
      count: of sinks, Z.
      carried: keys and values of the sinks of a document that began before these tokens; None: none
        did.
    """
    tokens = k.shape[1]
    index = starts[..., None] + jnp.arange(count)  # [B, T, Z]
    visible = (index <= jnp.arange(tokens)[:, None]) & valid[..., None]
    index = jnp.minimum(index, tokens - 1)
    if carried is not None:
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(carried, (k, v), strict=True))
        index = jnp.where(starts[..., None] < 0, jnp.arange(count), index + count)
    rows = jnp.arange(k.shape[0])[:, None, None]
    return KeyValues(k[rows, index], v[rows, index], visible, queries)
