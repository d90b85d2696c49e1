"""The decoding state while texts are read: its size, growth and copies."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array
from tptt_jax.config import LayerKind, LizaConfig, ModelConfig
from tptt_jax.decoder import DecodingState, StackCache, cache_capacity, init_decoding_state
from tptt_jax.layers.cache import KeyValueCache, softmax_window
from tptt_jax.model import CausalLM


def state_bytes(
    config: ModelConfig,
    liza: LizaConfig | None = None,
    *,
    batch_size: int = 1,
    max_tokens: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> int:
    """Exact bytes of the state after `max_tokens` tokens, without allocating it.

    Args:
      config: of the model.
      liza: of its memory; None: the plain base model.
      batch_size: rows.
      max_tokens: longest context; matters only for layers without a window.
      dtype: of keys, values and raw tokens.
    """
    empty = jax.eval_shape(
        lambda: init_decoding_state(
            config,
            liza,
            batch_size=batch_size,
            max_tokens=cache_capacity(config, liza, max_tokens),
            dtype=dtype,
        )
    )
    return empty.num_bytes


def grow_state(model: CausalLM, state: DecodingState, max_tokens: int) -> DecodingState:
    """The same state with room for `max_tokens` tokens.

    Args:
      model: whose state it is.
      state: returned unchanged if it has the room.
      max_tokens: of the longest row.
    """
    capacity = cache_capacity(model.config, model.liza, max_tokens)

    def grow(kind: LayerKind, cache: KeyValueCache) -> KeyValueCache:
        window = softmax_window(model.config, model.liza, kind)
        slots = capacity if window is None else window
        # Tokens lie in the order of their positions: a ring that must grow has not turned.
        missing = ((0, 0), (0, 0), (0, max(slots - cache.keys.shape[2], 0)), (0, 0), (0, 0))
        if not missing[2][1]:
            return cache
        return cache._replace(
            keys=jnp.pad(cache.keys, missing), values=jnp.pad(cache.values, missing)
        )

    def grow_stack(stack: StackCache) -> StackCache:
        if stack.softmax is None:
            return stack
        grown = {kind: grow(kind, cache) for kind, cache in stack.softmax.items()}
        return stack._replace(softmax=grown)

    return state._replace(stacks=tuple(grow_stack(stack) for stack in state.stacks))


def fork_state(state: DecodingState, copies: int = 1) -> DecodingState:
    """Copies of every row one after the other, e.g. for several questions about one document.

    Args:
      state: not changed.
      copies: rows for each row of `state`.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}.")

    def repeat(x: Array, axis: int) -> Array:
        return jnp.copy(x) if copies == 1 else jnp.repeat(x, copies, axis=axis)

    # Caches have their layers on the first axis.
    stacks = jax.tree.map(functools.partial(repeat, axis=1), state.stacks)
    length, hidden, seen = (repeat(x, 0) for x in (state.length, state.hidden, state.seen))
    return DecodingState(stacks, length, hidden, seen, state.layout)
