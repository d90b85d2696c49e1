"""Checks that a model can continue from a state."""

import functools
from typing import Any

import jax
import numpy as np

from tptt_jax.config import LayerKind, runs_memory
from tptt_jax.decoder import StackCache
from tptt_jax.inference.state import ReadState, init_state
from tptt_jax.layers.cache import KeyValueCache, softmax_window
from tptt_jax.layers.cache_checks import check_equal, check_ring
from tptt_jax.model import CausalLM

# Positions of later tokens must still be int32.
_LONGEST = 2**30


def check_state(
    model: CausalLM, state: ReadState, batch_size: int, *, use_memory: bool = True
) -> None:
    """Raises ValueError if a state does not fit this model and number of rows."""
    expected = jax.eval_shape(functools.partial(init_state, model, state.batch_size))
    check_equal("hidden", _describe(state.hidden), _describe(expected.hidden))
    check_equal("seen", list(state.seen.shape), list(expected.seen.shape))
    check_equal("stacks of layers", len(state.cache.stacks), len(expected.cache.stacks))
    if state.batch_size != batch_size:
        raise ValueError(
            f"the state has {state.batch_size} rows, the prompts have {batch_size}: "
            "fork_state(state, copies) gives every row copies."
        )
    if (use_memory and runs_memory(model.config, model.liza)) != state.has_memory:
        raise ValueError(
            f"the state was read {'with' if state.has_memory else 'without'} the memory: continue "
            f"with use_memory={state.has_memory}."
        )
    lengths = _check_lengths(state)
    longest = int(lengths.max(initial=0))
    for stack, empty in zip(state.cache.stacks, expected.cache.stacks, strict=True):
        memory = empty.memory if state.has_memory else None
        _check_stack(model, stack, empty._replace(memory=memory), longest)


def _check_lengths(state: ReadState) -> np.ndarray:
    """Raises ValueError unless every row has a possible number of tokens."""
    lengths = np.asarray(state.cache.length)
    if lengths.shape != (state.batch_size,) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"cache.length must be integers of shape [{state.batch_size}], got "
            f"{_describe(lengths)}: read the document again."
        )
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > _LONGEST:
        raise ValueError(
            f"the rows of the state must have 0 to {_LONGEST} tokens, got "
            f"{lengths.tolist()!s:.99}: read the document again."
        )
    return lengths


def _check_stack(model: CausalLM, stack: StackCache, expected: StackCache, longest: int) -> None:
    """Raises ValueError unless caches and memories have the model's shapes."""
    check_equal("softmax attention", stack.softmax is not None, expected.softmax is not None)
    if stack.softmax is not None and expected.softmax is not None:
        check_equal("kinds of layers", sorted(stack.softmax), sorted(expected.softmax))
        for kind, cache in stack.softmax.items():
            _check_ring(model, kind, cache, expected.softmax[kind], longest)
    check_equal("memory", _shapes(stack.memory), _shapes(expected.memory))


def _check_ring(
    model: CausalLM, kind: LayerKind, cache: KeyValueCache, expected: KeyValueCache, longest: int
) -> None:
    """Raises ValueError unless a ring has the slots of its layers' window."""
    check_ring(model.config, model.liza, kind, cache)
    slots = cache.keys.shape[2]
    if softmax_window(model.config, model.liza, kind) is None and longest > slots:
        raise ValueError(
            f"the state has {slots} slots for {longest} tokens, but layers without a window keep "
            "all tokens: read the document again."
        )
    check_equal(f"caches of {kind} layers", _without_slots(cache), _without_slots(expected))


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _without_slots(cache: KeyValueCache) -> list[str]:
    return [f"{x.dtype}{[*x.shape[:2], *x.shape[3:]]}" for x in cache]


def _shapes(tree: Any) -> list[str]:
    return [_describe(leaf) for leaf in jax.tree.leaves(tree)]
