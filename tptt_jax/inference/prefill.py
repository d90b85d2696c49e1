"""Reading prompts of any length: segments in a loop, compiled once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, HostTokens, Int, SegmentIds, Tokens
from tptt_jax.decoder import DecodingState
from tptt_jax.inference.state import fork_state, grow_state
from tptt_jax.inference.state_checks import check_state
from tptt_jax.model import CausalLM, check_context, init_cache
from tptt_jax.token_ids import check_token_ids, token_rows

# A prompt is read in long segments, CALL_TOKENS in one call of the device, and its remainder in
# short ones, so that a few words do not cost a whole segment.
SEGMENT_TOKENS = 1024
TAIL_TOKENS = 64
CALL_TOKENS = 32 * SEGMENT_TOKENS


class Prompts(NamedTuple):
    """Prompts without the padding before and inside them.

    Attributes:
      tokens: left-aligned [B, T], on the host.
      counts: tokens of each row [B].
    """

    tokens: Int[np.ndarray, "B T"]
    counts: Int[np.ndarray, "B"]


def read(
    model: CausalLM,
    tokens: Tokens | HostTokens,
    segment_ids: SegmentIds | HostTokens | None = None,
    *,
    state: DecodingState | None = None,
    use_memory: bool = True,
) -> DecodingState:
    """Reads prompts into a state, which can be generated from, forked, saved and extended.

    Device memory does not depend on the length if every layer has a window.

    Args:
      model: a base model or a Titan.
      tokens: the next tokens of each row [B, T].
      segment_ids: 0 marks padding, anywhere in a row [B, T]; None: none.
      state: of the tokens before these; not changed. None: there are none.
      use_memory: False leaves the memory out; with a state it must be as before.

    Returns:
      The state after the last token of each row.

    Raises:
      ValueError: if a row has no token at all, or the state does not fit.
    """
    prompts = align_prompts(tokens, segment_ids, may_be_empty=state is not None)
    if state is None:
        rows = len(prompts.counts)
        state = init_cache(model, rows, use_memory=use_memory, growable=True)
    else:
        check_state(model, state, len(prompts.counts), use_memory=use_memory)
        # The initial state is donated to XLA.
        state = fork_state(state)
    return extend_state(model, prompts, state)


def align_prompts(
    given: Tokens | HostTokens,
    segment_ids: SegmentIds | HostTokens | None,
    *,
    may_be_empty: bool = False,
) -> Prompts:
    """Moves padding to the end of its row.

    Raises:
      ValueError: if shapes are wrong, or a prompt is empty without a state.
    """
    tokens = token_rows(given)
    valid = np.ones(tokens.shape, bool) if segment_ids is None else np.asarray(segment_ids) != 0
    if valid.shape != tokens.shape:
        raise ValueError(f"segment_ids must have shape {tokens.shape} ([B, T]), got {valid.shape}.")
    counts = valid.sum(axis=1)
    if tokens.shape[0] == 0 or not (may_be_empty or counts.all()):
        raise ValueError("every prompt needs at least one token: start it with the BOS token.")
    if not valid.all():
        order = np.argsort(~valid, axis=1, kind="stable")
        tokens = np.take_along_axis(tokens, order, axis=1)
    return Prompts(tokens[:, : counts.max(initial=0)], counts)


def extend_state(model: CausalLM, prompts: Prompts, state: DecodingState) -> DecodingState:
    """`read` for aligned prompts; the arrays of `state` are donated."""
    seen = int(np.max(state.length, initial=0))
    valid = np.arange(prompts.tokens.shape[1]) < prompts.counts[:, None]
    check_token_ids(prompts.tokens[valid], model.config.vocab_size)
    check_positions(model, int(np.max(np.asarray(state.length) + prompts.counts)))
    graphdef, weights = nnx.split(model)
    width = prompts.tokens.shape[1]
    whole = width - width % SEGMENT_TOKENS
    calls = [(start, SEGMENT_TOKENS, CALL_TOKENS) for start in range(0, whole, CALL_TOKENS)]
    if whole < width:
        calls.append((whole, TAIL_TOKENS, SEGMENT_TOKENS))
    for start, size, room in calls:
        end = min(start + room, whole if size == SEGMENT_TOKENS else width)
        buffer = np.zeros((len(prompts.counts), room), np.int32)
        buffer[:, : end - start] = prompts.tokens[:, start:end]
        counts = np.clip(prompts.counts - start, 0, end - start).astype(np.int32)
        state = grow_state(model, state, seen + end)
        state = _read(graphdef, size, weights, buffer, counts, state)
    return state


def check_positions(model: CausalLM, tokens: int) -> None:
    """Raises ValueError if the model cannot read this many tokens with a cache."""
    config = model.config
    check_context(config, tokens)
    if config.position_embedding == "learned" and tokens > config.max_positions:
        raise ValueError(
            f"{tokens} tokens are more than the {config.max_positions} positions that this model "
            "has learned: shorten the prompt or max_new_tokens."
        )


@functools.partial(jax.jit, static_argnames=("graphdef", "size"), donate_argnames="state")
def _read(
    graphdef: nnx.GraphDef,
    size: int,
    weights: nnx.State,
    tokens: Array,
    counts: Array,
    state: DecodingState,
) -> DecodingState:
    """Reads the first `counts` of `tokens` [B, T] in segments of `size`, which divides T.

    `lax.scan` would fix the number of segments at compilation; a loop with a dynamic number needs
    one program for all lengths.
    """
    model: CausalLM = nnx.merge(graphdef, weights)

    def read_segment(index: Array, state: DecodingState) -> DecodingState:
        part = lax.dynamic_slice_in_dim(tokens, index * size, size, axis=1)
        valid = index * size + jnp.arange(size) < counts[:, None]
        _, after, _ = model.forward_hidden(
            part, valid.astype(jnp.int32), cache=state, use_memory=state.has_memory
        )
        assert after is not None
        return after

    return lax.fori_loop(0, -(-jnp.max(counts) // size), read_segment, state)
