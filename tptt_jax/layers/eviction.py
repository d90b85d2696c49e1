"""The tokens that leave a layer's window during a call."""

from typing import NamedTuple

import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.layers.cache import KeyValueCache
from tptt_jax.layers.memory import MemoryTokens
from tptt_jax.layers.softmax_attention import SoftmaxSettings, TokenContext
from tptt_jax.ops.attention.rope import rotate
from tptt_jax.ops.context import is_split
from tptt_jax.ops.eviction import delay_tokens, evicted_ids


class Evicted(NamedTuple):
    """The evicted tokens at each place of a call.

    Attributes:
      tokens: the token that leaves at each place, and how many the memory then holds; sinks leave,
        but are not written.
      before: tokens that had left before the call [B]; None without a cache.
      first: the place before which none has left in any row.
    """

    tokens: MemoryTokens
    before: Int[Array, "B"] | None
    first: int = 0

    @property
    def held(self) -> Int[Array, "B T"]:
        """Tokens that the memory holds, the one of this place included."""
        assert self.tokens.held is not None, "evicted tokens are counted"
        return self.tokens.held


def evict(
    settings: SoftmaxSettings,
    context: TokenContext,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    cache: KeyValueCache | None = None,
) -> Evicted:
    """Finds the tokens that leave the window.

    With a cache they come out of its ring, whose keys are rotated back, or, in a call longer than
    the window, from the call itself.

    Args:
      settings: window and sinks of the layer.
      context: of the tokens of the call.
      k: their keys [B, T, K, D], not rotated.
      v: their values [B, T, K, D].
      cache: of the layer before the call; None: rows start with it.
    """
    assert settings.window is not None, "without a window no token leaves"
    window = settings.window if context.window is None else context.window
    left = context.positions - window
    ids = evicted_ids(context.positions, context.segment_ids, window)
    before, first = None, 0
    if cache is None:
        # Rows that are divided among devices keep their length, which others could not divide.
        if context.window is None and not is_split(k.shape[1]):
            first = min(settings.window, k.shape[1] - 1)
        keys, values = (delay_tokens(x, window, settings.window) for x in (k, v))
    else:
        assert context.length is not None
        keys, values = _from_cache(context, cache, left, k, v)
        before = jnp.maximum(context.length - window, 0)
    held = jnp.maximum(left - settings.sinks + 1, 0)
    tokens = MemoryTokens(keys, values, ids, left >= settings.sinks, held=held)
    return Evicted(tokens, before, first)


def _from_cache(
    context: TokenContext,
    cache: KeyValueCache,
    left: Int[Array, "B T"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
) -> tuple[Array, Array]:
    """Keys, rotated back, and values of the tokens at positions `left`; arbitrary below 0."""
    assert context.length is not None
    rows = jnp.arange(k.shape[0])[:, None]
    slot = left % cache.keys.shape[1]
    keys = rotate(cache.keys[rows, slot].astype(k.dtype), context.evicted_angles)
    values = cache.values[rows, slot].astype(v.dtype)
    if k.shape[1] <= cache.keys.shape[1] and context.window is None:
        return keys, values
    # Tokens of a long call that enter the window and leave it again.
    order = jnp.argsort(~context.valid, axis=1, stable=True)
    since = left - context.length[:, None]
    place = jnp.take_along_axis(order, jnp.clip(since, 0, k.shape[1] - 1), axis=1)
    is_new = (since >= 0)[..., None, None]
    return jnp.where(is_new, k[rows, place], keys), jnp.where(is_new, v[rows, place], values)
