"""The state of a model after reading; of fixed size if every layer has a window."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Bool, Float
from tptt_jax.config import LayerKind, LizaConfig, ModelConfig, layer_kinds, runs_memory
from tptt_jax.decoder import Cache, StackCache, init_stack_caches
from tptt_jax.layers.cache import KeyValueCache, softmax_window
from tptt_jax.model import CausalLM

_SMALLEST_CACHE = 512


class ReadState(NamedTuple):
    """Everything that generation needs of the previous tokens.

    Attributes:
      cache: of all layers. Its memories are None if it was read without them.
      hidden: of each row's last token, after the last norm [B, E].
      seen: which tokens each row holds, for the repetition penalty [B, V].
    """

    cache: Cache
    hidden: Float[Array, "B E"]
    seen: Bool[Array, "B V"]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.hidden.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def has_memory(self) -> bool:
        """Whether the memory was written."""
        return any(stack.memory is not None for stack in self.cache.stacks)


def init_state(
    model: CausalLM, batch_size: int, max_tokens: int = 0, *, use_memory: bool = True
) -> ReadState:
    """The state before the first token.

    Args:
      model: whose layers it is for.
      batch_size: rows B.
      max_tokens: initial room in layers without a window; `read` and `generate` enlarge it as
        needed.
      use_memory: False leaves the memory out.
    """
    with_memory = use_memory and runs_memory(model.config, model.liza)
    capacity = cache_capacity(model.config, model.liza, max_tokens)
    return _empty_state(model.config, model.liza, batch_size, capacity, model.dtype, with_memory)


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
    capacity = cache_capacity(config, liza, max_tokens)
    make = functools.partial(_empty_state, config, liza, batch_size, capacity, dtype)
    shapes = jax.eval_shape(functools.partial(make, runs_memory(config, liza)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def cache_capacity(config: ModelConfig, liza: LizaConfig | None, max_tokens: int) -> int:
    """Slots to ask `init_cache` for: a power of two, so that few programs are compiled.

    If every layer has a window, it is the widest, whatever `max_tokens`.
    """
    windows = [softmax_window(config, liza, kind) for kind in set(layer_kinds(config, liza))]
    known = [window for window in windows if window is not None]
    if len(known) == len(windows) or (liza is not None and not liza.softmax):
        return max(known, default=1)
    size = _SMALLEST_CACHE
    while size < max_tokens:
        size *= 2
    return size


def grow_state(model: CausalLM, state: ReadState, max_tokens: int) -> ReadState:
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

    stacks = tuple(grow_stack(stack) for stack in state.cache.stacks)
    return state._replace(cache=state.cache._replace(stacks=stacks))


def fork_state(state: ReadState, copies: int = 1) -> ReadState:
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
    stacks = jax.tree.map(functools.partial(repeat, axis=1), state.cache.stacks)
    length, hidden, seen = (repeat(x, 0) for x in (state.cache.length, state.hidden, state.seen))
    return ReadState(Cache(stacks, length), hidden, seen)


# One program, not one for every array: they would take longer than the first token itself.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _empty_state(
    config: ModelConfig,
    liza: LizaConfig | None,
    batch_size: int,
    capacity: int,
    dtype: DTypeLike,
    with_memory: bool,
) -> ReadState:
    stacks = init_stack_caches(
        config, liza, batch=batch_size, max_tokens=capacity, dtype=jnp.dtype(dtype)
    )
    if not with_memory:
        stacks = tuple(stack._replace(memory=None) for stack in stacks)
    return ReadState(
        Cache(stacks, jnp.zeros((batch_size,), jnp.int32)),
        jnp.zeros((batch_size, config.embed_dim), jnp.dtype(dtype)),
        jnp.zeros((batch_size, config.vocab_size), bool),
    )
