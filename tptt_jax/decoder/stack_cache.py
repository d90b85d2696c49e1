"""The caches of a stack's layers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array
from tptt_jax.config import LayerKind, LizaConfig, ModelConfig, layer_kinds
from tptt_jax.decoder.places import layer_stacks
from tptt_jax.layers.cache import (
    KeyValueCache,
    MemoryState,
    init_key_value_cache,
    init_memory_state,
)
from tptt_jax.layers.softmax_attention import TokenContext, extend_cache


class StackCache(NamedTuple):
    """The state of one stack's layers between calls.

    Attributes:
      softmax: one cache per kind of layer, with a leading axis over the layers of that
        kind; None in a purely linear model.
      memory: with a leading axis over the layers whose memory runs; None without any.
    """

    softmax: dict[LayerKind, KeyValueCache] | None
    memory: MemoryState | None


def init_stack_caches(
    config: ModelConfig,
    liza: LizaConfig | None,
    *,
    batch: int,
    max_tokens: int,
    dtype: DTypeLike,
) -> tuple[StackCache, ...]:
    """The empty caches of all stacks; see `init_decoding_state`."""

    def stacked(layer: Any, count: int) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), layer)

    stacks, of_layers = [], layer_kinds(config, liza)
    for layers in layer_stacks(config):
        kinds: list[LayerKind] = [of_layers[i] for i in layers]
        sizes = config.of_layer(layers[0])
        softmax = memory = None
        if liza is None or liza.softmax:
            softmax = {}
            for kind in dict.fromkeys(kinds):
                one = init_key_value_cache(
                    sizes, liza, kind, batch=batch, max_tokens=max_tokens, dtype=dtype
                )
                softmax[kind] = stacked(one, kinds.count(kind))
        running = 0 if liza is None else sum(map(liza.runs_memory, kinds))
        if liza is not None and running:
            heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
            one = init_memory_state(liza, batch, *heads, dtype)
            memory = stacked(one, running)
        stacks.append(StackCache(softmax, memory))
    return tuple(stacks)


def extend_stack_cache(
    kinds: tuple[LayerKind, ...],
    contexts: dict[LayerKind, TokenContext],
    cache: StackCache,
    keys: Array | None,
    values: Array | None,
    memory: MemoryState | None,
) -> StackCache:
    """Writes the tokens of a call into the caches of all layers of each kind at once.

    Args:
      kinds: of the layers, in order.
      contexts: of the tokens, by kind.
      cache: before the call.
      keys: rotated keys of the tokens [L, B, T, K, D] for L layers; None without softmax.
      values: likewise.
      memory: the new states.
    """
    if cache.softmax is None:
        return StackCache(None, memory)
    assert keys is not None
    assert values is not None
    softmax = {}
    for kind, old in cache.softmax.items():
        mine = jnp.array([i for i, other in enumerate(kinds) if other == kind])
        write = functools.partial(extend_cache, contexts[kind])
        softmax[kind] = jax.vmap(write)(old, keys[mine], values[mine])
    return StackCache(softmax, memory)
