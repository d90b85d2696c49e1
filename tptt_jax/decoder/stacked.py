"""Layers whose parameters have a leading axis: made, spread over a scan, and split up."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax.array_typing import Array
from tptt_jax.decoder.layer import DecoderLayer
from tptt_jax.layers.parameters import MemoryParam

Split = Callable[[Array], Sequence[Array]]


def init_stacked(
    make_layer: Callable[[Array], DecoderLayer], has_memory: Sequence[bool], rngs: nnx.Rngs
) -> DecoderLayer:
    """A layer whose parameters have a leading axis over the layers of a stack.

    Args:
      make_layer: one layer with a memory if any has one, from a key.
      has_memory: whether each layer has a memory. Parameters of the memory have a leading axis
        over those layers.
      rngs: its stream "params" is used.
    """
    keys = jax.random.split(rngs.params(), len(has_memory))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_layer(keys[0])))
    state = jax.vmap(lambda key: nnx.state(make_layer(key)))(keys)
    of_memory, others = nnx.split_state(state, MemoryParam, ...)
    places = np.flatnonzero(has_memory)
    of_memory = jax.tree.map(lambda x: x[places], of_memory)
    return nnx.merge(graphdef, of_memory, others)


def split_layers(
    stacked: DecoderLayer, has_memory: Sequence[bool], split: Split
) -> list[DecoderLayer]:
    """The layers of a stack as modules of their own; only those whose flag is set have a memory.

    Args:
      stacked: from `init_stacked`; not changed.
      has_memory: one flag for each layer.
      split: cuts an array into the entries of its first axis.
    """
    graphdef, of_memory, others = nnx.split(stacked, MemoryParam, ...)
    memories = iter(_entries(of_memory, sum(has_memory), split))
    bare = nnx.merge(*nnx.split(stacked))
    bare.self_attn.memory = bare.self_attn.mag = nnx.data(None)
    bare_graphdef = nnx.graphdef(bare)
    return [
        nnx.merge(graphdef, next(memories), layer) if mine else nnx.merge(bare_graphdef, layer)
        for layer, mine in zip(_entries(others, len(has_memory), split), has_memory, strict=True)
    ]


def _entries(state: nnx.State, count: int, split: Split) -> list[nnx.State]:
    """The entries of a stacked state, one by one."""
    leaves, treedef = jax.tree.flatten(state)
    parts = [split(leaf) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [part[i] for part in parts]) for i in range(count)]


def spread_memory(tree: Any, flags: Sequence[bool]) -> Any:
    """Gives every layer its own entry; layers without one get another's and must not read it.

    Args:
      tree: arrays with a leading axis over the layers whose flag is set, or None.
      flags: one for each layer.
    """
    if tree is None or all(flags) or not any(flags):
        return tree
    index = np.maximum(np.cumsum(flags) - 1, 0)
    return jax.tree.map(lambda x: x[index], tree)


def stack_trees(trees: Sequence[Any]) -> Any:
    """Stacks equal trees along a new leading axis; None if there are none."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else None
