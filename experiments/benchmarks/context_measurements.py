"""Speed and memory of decoding as the context grows; `experiments.bench context` runs it."""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.process.memory_use import peak_gb, resident_gb
from tptt_jax import CausalLM, DecodingState, init_cache
from tptt_jax.array_typing import Int
from tptt_jax.decoder import cache_capacity
from tptt_jax.inference.generate import Stops, stream
from tptt_jax.inference.prefill import CALL_TOKENS, SEGMENT_TOKENS, read
from tptt_jax.inference.state import grow_state

_BLOCK = 16


def measure_contexts(
    model: CausalLM,
    tokens: Int[np.ndarray, " L"],
    contexts: Sequence[int],
    *,
    new_tokens: int,
    read_limit: int,
    use_memory: bool,
) -> Iterator[dict[str, Any]]:
    """Reads a text up to each context in turn, and decodes there.

    Args:
      model: a base model or a Titan.
      tokens: the text, as long as the longest context.
      contexts: lengths, ascending.
      new_tokens: decoded at the end of each; the first two blocks are not timed.
      read_limit: beyond this length the text is not read, and caches without a window keep
        arbitrary contents: decoding time does not depend on them.
      use_memory: False leaves the memory out.

    Yields:
      For each context, as soon as it is measured: seconds per token of prefill (None beyond the
      limit) and decoding, bytes of state, current and peak memory.
    """

    def programs(context: int) -> tuple[int, bool]:
        """Identifies the programs that run; equal for all contexts that fit the windows."""
        return cache_capacity(model.config, model.liza, context), context <= read_limit

    state, length = init_cache(model, 1, use_memory=use_memory, growable=True), 0
    for context in contexts:
        # The decoded tokens are the last of the context.
        end, is_read = context - new_tokens, context <= read_limit
        alike = [other for other in contexts if programs(other) == programs(context)]
        if context == alike[0]:
            few = tokens[: alike[-1] - new_tokens] if is_read else tokens[:0]
            empty = init_cache(model, 1, context, use_memory=use_memory, growable=True)
            _run_all_programs(model, few, empty, new_tokens)
            del empty
        state = jax.block_until_ready(grow_state(model, state, context))
        if is_read:
            start = time.perf_counter()
            for first in range(length, end, CALL_TOKENS):
                piece = tokens[None, first : min(first + CALL_TOKENS, end)]
                state = read(model, piece, state=state, use_memory=use_memory)
            jax.block_until_ready(state)
            prefill = (time.perf_counter() - start) / (end - length)
        else:
            state, prefill = _of_length(state, end), None
        length = end
        yield {
            "context": context,
            "prefill_s_per_token": prefill,
            "decode_s_per_token": _decode_seconds(model, state, new_tokens),
            "state_bytes": state.num_bytes,
            "resident_gb": resident_gb(),
            "peak_gb": peak_gb(),
        }


def _run_all_programs(
    model: CausalLM, tokens: Int[np.ndarray, " L"], empty: DecodingState, new_tokens: int
) -> None:
    """Compiles and runs all programs that contexts with such a state need.

    Measurements then include neither compilation nor memory that first runs leave behind.
    """
    # Twice: the first round fragments memory, so the second may still make the process grow.
    for _ in range(2):
        state = empty if len(tokens) else _of_length(empty, 1)
        # A long segment if there will be any, and a short one.
        for piece in (tokens[:SEGMENT_TOKENS], tokens[:1]):
            state = read(model, piece[None], state=state, use_memory=state.has_memory)
        # The first block is one token; all longer ones are the same program.
        for _ in itertools.islice(_decode(model, state, new_tokens), 2):
            pass


def _decode_seconds(model: CausalLM, state: DecodingState, new_tokens: int) -> float:
    """Median over blocks of the time per token."""
    start, seconds = time.perf_counter(), []
    for block in _decode(model, state, new_tokens):
        now = time.perf_counter()
        seconds.append((now - start) / block.shape[1])
        start = now
    return statistics.median(seconds[2:])


def _decode(model: CausalLM, state: DecodingState, new_tokens: int) -> Iterator[np.ndarray]:
    return stream(
        model,
        np.zeros((1, 0), np.int32),
        new_tokens,
        stops=Stops(tokens=()),
        state=state,
        use_memory=state.has_memory,
        block=_BLOCK,
    )


def _of_length(state: DecodingState, length: int) -> DecodingState:
    """The same state with another nominal length."""
    return state._replace(length=jnp.full_like(state.length, length))
