"""Whether a state is one that a model can go on from."""

import functools
from typing import Any

import jax
import numpy as np

from tptt_jax.config import LayerKind, runs_memory
from tptt_jax.decoder import StackCache
from tptt_jax.inference.state import ReadState, init_state
from tptt_jax.layers.cache import KeyValueCache, softmax_window
from tptt_jax.layers.cache_checks import ANOTHER_SHAPE, check_ring
from tptt_jax.model import CausalLM

# Positions of later tokens must still be int32.
_LONGEST = 2**30


def check_state(
    model: CausalLM, state: ReadState, batch_size: int, *, use_memory: bool = True
) -> None:
    """Raises ValueError if a state is not for this model and so many rows."""
    want = jax.eval_shape(functools.partial(init_state, model, state.batch_size))
    sizes = [(x.hidden.shape, x.hidden.dtype, x.seen.shape) for x in (state, want)]
    if sizes[0] != sizes[1] or len(state.cache.stacks) != len(want.cache.stacks):
        raise ValueError(ANOTHER_SHAPE)
    if state.batch_size != batch_size:
        raise ValueError(
            f"the state has {state.batch_size} rows, the prompts have {batch_size}: "
            "fork_state(state, copies) gives every row copies."
        )
    if (use_memory and runs_memory(model.config, model.liza)) != state.has_memory:
        raise ValueError(
            f"the state was read {'with' if state.has_memory else 'without'} the memory: go on the "
            f"same way, with use_memory={state.has_memory}."
        )
    lengths = _check_lengths(state)
    for stack, wanted in zip(state.cache.stacks, want.cache.stacks, strict=True):
        memory = wanted.memory if state.has_memory else None
        _check_stack(model, stack, wanted._replace(memory=memory), int(lengths.max(initial=0)))


def _check_lengths(state: ReadState) -> np.ndarray:
    """Raises ValueError unless there is a possible number of tokens for every row."""
    lengths = np.asarray(state.cache.length)
    if lengths.shape != (state.batch_size,) or lengths.dtype.kind not in "iu":
        raise ValueError(ANOTHER_SHAPE)
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > _LONGEST:
        raise ValueError(
            f"the rows of the state must have 0 to {_LONGEST} tokens, got "
            f"{lengths.tolist()!s:.99}: read the document again."
        )
    return lengths


def _check_stack(model: CausalLM, stack: StackCache, want: StackCache, longest: int) -> None:
    """Raises ValueError unless caches and memories are as the model makes them."""
    if (stack.softmax is None) != (want.softmax is None):
        raise ValueError(ANOTHER_SHAPE)
    if stack.softmax is not None and want.softmax is not None:
        if stack.softmax.keys() != want.softmax.keys():
            raise ValueError(ANOTHER_SHAPE)
        for kind, cache in stack.softmax.items():
            _check_ring(model, kind, cache, want.softmax[kind], longest)
    if _shapes(stack.memory) != _shapes(want.memory):
        raise ValueError(ANOTHER_SHAPE)


def _check_ring(
    model: CausalLM, kind: LayerKind, cache: KeyValueCache, want: KeyValueCache, longest: int
) -> None:
    """Raises ValueError unless a ring has the slots that its layers' window asks for."""
    check_ring(model.config, model.liza, kind, cache)
    slots = cache.keys.shape[2]
    if softmax_window(model.config, model.liza, kind) is None and longest > slots:
        raise ValueError(
            f"the state has {slots} slots for {longest} tokens, where layers without a window keep "
            "all of them: read the document again."
        )
    if _without_slots(cache) != _without_slots(want):
        raise ValueError(ANOTHER_SHAPE)


def _without_slots(cache: KeyValueCache) -> list[tuple[Any, ...]]:
    return [(*x.shape[:2], *x.shape[3:], x.dtype) for x in cache]


def _shapes(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
