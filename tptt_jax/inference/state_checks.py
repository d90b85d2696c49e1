"""Checks that a model can continue from a state."""

from typing import Any

import jax
import numpy as np

from tptt_jax.decoder import DecodingState, StackCache, check_decoding_state
from tptt_jax.layers.cache import KeyValueCache, softmax_window
from tptt_jax.layers.cache_checks import check_equal
from tptt_jax.model import CausalLM, init_cache

# Positions of later tokens must still be int32.
_LONGEST = 2**30


def check_state(
    model: CausalLM, state: DecodingState, batch_size: int, *, use_memory: bool = True
) -> None:
    """Raises ValueError if a state does not fit this model and number of rows.

    It reads lengths, so it does not work inside of `jax.jit`.
    """
    expected = jax.eval_shape(
        lambda: init_cache(model, state.batch_size, use_memory=state.has_memory, growable=True)
    )
    check_equal("hidden", _describe(state.hidden), _describe(expected.hidden))
    check_equal("seen", list(state.seen.shape), list(expected.seen.shape))
    check_decoding_state(
        model.config,
        model.liza,
        state,
        dtype=str(model.dtype),
        rows=batch_size,
        use_memory=use_memory,
    )
    if state.has_memory and not use_memory:
        raise ValueError("the state was read with the memory: continue with use_memory=True.")
    longest = int(_check_lengths(state).max(initial=0))
    for stack, empty in zip(state.stacks, expected.stacks, strict=True):
        _check_stack(model, stack, empty, longest)


def _check_lengths(state: DecodingState) -> np.ndarray:
    """Raises ValueError unless every row has a possible number of tokens."""
    lengths = np.asarray(state.length)
    if lengths.shape != (state.batch_size,) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"length must be integers of shape [{state.batch_size}], got "
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
    for kind, cache in (stack.softmax or {}).items():
        assert expected.softmax is not None
        slots = cache.keys.shape[2]
        if softmax_window(model.config, model.liza, kind) is None and longest > slots:
            raise ValueError(
                f"the state has {slots} slots for {longest} tokens, but layers without a window "
                "keep all tokens: read the document again."
            )
        own, other = _without_slots(cache), _without_slots(expected.softmax[kind])
        check_equal(f"caches of {kind} layers", own, other)
    check_equal("memory", _shapes(stack.memory), _shapes(expected.memory))


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _without_slots(cache: KeyValueCache) -> list[str]:
    return [f"{x.dtype}{[*x.shape[:2], *x.shape[3:]]}" for x in cache]


def _shapes(tree: Any) -> list[str]:
    return [_describe(leaf) for leaf in jax.tree.leaves(tree)]
