"""Generation: reads a prompt once, then decodes in blocks with one compiled loop."""

import functools
from dataclasses import dataclass
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, HostTokens, Int, Key, SegmentIds, Tokens
from tptt_jax.decoder import DecodingState
from tptt_jax.inference.prefill import (
    align_prompts,
    check_positions,
    extend_state,
)
from tptt_jax.inference.sampling import Sampling, sample
from tptt_jax.inference.state import fork_state, grow_state
from tptt_jax.inference.state_checks import check_state
from tptt_jax.inference.text import Decode, TextStream, check_stop_strings
from tptt_jax.inference.unstack import unstack_layers
from tptt_jax.model import CausalLM, init_cache

# Steps between two checks of the host: whether rows are done, and whether caches must grow.
LONGEST_BLOCK = 64
STREAM_BLOCK = 16
# Initial room for new tokens in caches without a window.
_ROOM = 512
_STOPS_AT_A_TIME = 8


class GenerateResult(NamedTuple):
    """Generated tokens and the final state.

    Attributes:
      tokens: [B, max_new_tokens] int32; after a row's end, padding.
      lengths: tokens of each row, the one that ended it included [B].
      state: after the new tokens, for continuation. A row that ended by a stop string may
        have read up to 63 tokens more.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    state: DecodingState


@dataclass(frozen=True, kw_only=True)
class Stops:
    """Conditions that end a row before `max_new_tokens`."""

    tokens: tuple[int, ...] | None = None
    """None: the model's end-of-text tokens."""
    strings: tuple[str, ...] = ()
    decode: Decode | None = None
    """From tokens to text; needed with `strings`."""

    def __post_init__(self) -> None:
        """Rejects stop strings without `decode`."""
        check_stop_strings(self.strings)
        if self.strings and self.decode is None:
            raise ValueError("stop_strings need decode, e.g. decode=tokenizer.decode.")


class _Decoding(NamedTuple):
    """The state of decoding from token to token."""

    state: DecodingState
    done: Array  # [B]: whether the row has ended
    keys: Array  # [B]


def generate(
    model: CausalLM,
    tokens: Tokens | HostTokens,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    key: Key[Array, "*B"] | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    segment_ids: SegmentIds | HostTokens | None = None,
    stop_tokens: tuple[int, ...] | None = None,
    stop_strings: tuple[str, ...] = (),
    decode: Decode | None = None,
    state: DecodingState | None = None,
    use_memory: bool = True,
) -> GenerateResult:
    """Continues prompts.

    Compiled once for reading and once for decoding, whatever the lengths; where layers
    have no window, once more whenever their cache doubles.

    Args:
      model: a base model or a Titan.
      tokens: prompts [B, T] int32; with a `state` they may be empty.
      max_new_tokens: how many to add at most.
      temperature: 0 is greedy.
      key: randomness for temperature > 0, or one key for each row; None: jax.random.key(0).
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens that together have this probability; 1: all.
      min_p: only tokens with at least min_p times the highest probability; 0: all.
      repetition_penalty: logits of tokens already seen are divided (above zero) or multiplied
        (below) by it; 1: no penalty.
      segment_ids: 0 marks padding, anywhere in a row [B, T]; None: none.
      stop_tokens: end a row; None: the model's end-of-text tokens.
      stop_strings: end a row with the token that completes one of them.
      decode: from tokens to text, e.g. tokenizer.decode; needed with stop_strings.
      state: of the rows before these tokens, from `read`, `load_state` or an earlier result; not
        changed.
      use_memory: False leaves the memory out.

    Returns:
      The new tokens, without the prompt, and the state after them.

    Raises:
      ValueError: if a prompt is empty or an argument is out of range.
    """
    blocks = stream(
        model,
        tokens,
        max_new_tokens,
        key,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        stops=Stops(tokens=stop_tokens, strings=stop_strings, decode=decode),
        segment_ids=segment_ids,
        state=state,
        use_memory=use_memory,
        block=LONGEST_BLOCK,
    )
    new = np.concatenate(list(blocks), axis=1)
    filled = np.full((len(new), max_new_tokens), _padding_token(model), np.int32)
    filled[:, : new.shape[1]] = new
    # jnp.asarray would compile a program for every max_new_tokens.
    new, lengths = jax.device_put((filled, blocks.lengths.astype(np.int32)))
    return GenerateResult(new, lengths, blocks.state)


def stream(
    model: CausalLM,
    tokens: Tokens | HostTokens,
    max_new_tokens: int = 32,
    key: Key[Array, "*B"] | None = None,
    *,
    sampling: Sampling | None = None,
    stops: Stops | None = None,
    segment_ids: SegmentIds | HostTokens | None = None,
    state: DecodingState | None = None,
    use_memory: bool = True,
    block: int = STREAM_BLOCK,
) -> "TokenStream":
    """`generate`, block by block; the prompts are read before it returns.

    Args:
      model: a base model or a Titan.
      tokens: prompts [B, T] int32; with a `state` they may be empty.
      max_new_tokens: how many to add at most.
      key: randomness, or one key for each row; None: jax.random.key(0).
      sampling: sampling settings; None: greedy.
      stops: conditions that end a row; None: the model's end-of-text tokens.
      segment_ids: 0 marks padding, anywhere in a row [B, T]; None: none.
      state: of the rows before these tokens; not changed.
      use_memory: False leaves the memory out.
      block: tokens at a time, 1 to 64; the first token comes alone if that is not 64.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not 1 <= block <= LONGEST_BLOCK:
        raise ValueError(f"block must lie between 1 and {LONGEST_BLOCK}, got {block}.")
    sampling = Sampling() if sampling is None else sampling
    sampling.check()
    prompts = align_prompts(tokens, segment_ids, may_be_empty=state is not None)
    rows = len(prompts.counts)
    if state is None:
        room = int(prompts.counts.max()) + min(max_new_tokens, _ROOM)
        state = init_cache(model, rows, room, use_memory=use_memory, growable=True)
    else:
        check_state(model, state, rows, use_memory=use_memory)
        if (np.asarray(state.length) + prompts.counts == 0).any():
            raise ValueError("every row needs at least one token, in the state or in the prompt.")
        state = fork_state(state)
    longest = int(np.max(np.asarray(state.length) + prompts.counts))
    check_positions(model, longest + max_new_tokens)
    state = extend_state(model, prompts, state)
    decoding = _Decoding(state, jnp.zeros((rows,), bool), _row_keys(key, rows))
    return TokenStream(model, decoding, sampling, stops or Stops(), max_new_tokens, longest, block)


class TokenStream:
    """An iterator over blocks of new tokens [B, n]; what follows a row's end is padding.

    Attributes:
      state: after the tokens so far, until the next block is taken.
      lengths: tokens of each row so far, the one that ended it included [B].
    """

    def __init__(
        self,
        model: CausalLM,
        decoding: _Decoding,
        sampling: Sampling,
        stops: Stops,
        max_new_tokens: int,
        longest: int,
        block: int,
    ) -> None:
        """See `stream`."""
        self._model = model
        # For a few tokens a longer compilation does not pay.
        long = max_new_tokens >= LONGEST_BLOCK
        self._split = nnx.split(unstack_layers(model) if long else model)
        self._decoding, self._sampling = decoding, sampling
        self._left, self._longest, self._block = max_new_tokens, longest, block
        self._count = LONGEST_BLOCK if block == LONGEST_BLOCK else 1
        ends = model.config.eos_token_ids if stops.tokens is None else tuple(stops.tokens)
        # Rounded up, as their number is part of the compiled program.
        self._stops = np.full(-(-max(len(ends), 1) // _STOPS_AT_A_TIME) * _STOPS_AT_A_TIME, -1)
        self._stops[: len(ends)] = ends
        rows = decoding.done.shape[0]
        self.lengths = np.zeros(rows, int)
        self._done = np.zeros(rows, bool)
        self._texts: list[TextStream] = []
        if stops.strings and stops.decode is not None:
            self._texts = [TextStream(stops.decode, stops.strings) for _ in range(rows)]

    @property
    def state(self) -> DecodingState:
        """After the tokens so far."""
        return self._decoding.state

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> np.ndarray:
        """The next tokens."""
        if self._left == 0 or self._done.all():
            raise StopIteration
        count = min(self._count, self._left)
        grown = grow_state(self._model, self._decoding.state, self._longest + count)
        padding = _padding_token(self._model)
        graphdef, weights = self._split
        self._decoding, new = _decode(
            graphdef,
            weights,
            self._decoding._replace(state=grown),
            self._sampling,
            jnp.asarray(self._stops, jnp.int32),
            padding,
            count,
        )
        block = np.array(new)[:, :count]
        for row in np.flatnonzero(~self._done).tolist():
            kept = self._end_row(row, block[row].tolist())
            self.lengths[row] += kept
            block[row, kept:] = padding
        if self._texts:
            self._decoding = self._decoding._replace(done=jnp.asarray(self._done))
        self._left -= count
        self._longest += count
        self._count = self._block
        return block

    def _end_row(self, row: int, new: list[int]) -> int:
        """The number of new tokens that a row keeps."""
        kept = next((i + 1 for i, token in enumerate(new) if token in self._stops), len(new))
        self._done[row] = len(new) > 0 and new[kept - 1] in self._stops
        if self._texts:
            text = self._texts[row]
            before = text.num_tokens
            text.push(new[:kept])
            if text.stopped:
                self._done[row] = True
                return text.num_tokens - before
        return kept


def _padding_token(model: CausalLM) -> int:
    config = model.config
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0


def _row_keys(key: Array | None, rows: int) -> Array:
    key = jax.random.key(0) if key is None else key
    if key.ndim == 0:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key must be one key or one for each of {rows} rows, got {key.shape}.")
    # A copy, because decoding writes into its arguments.
    return jnp.copy(key)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="decoding")
def _decode(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    decoding: _Decoding,
    sampling: Sampling,
    stops: Array,
    padding: Array,
    count: Array,
) -> tuple[_Decoding, Array]:
    """`count` tokens, LONGEST_BLOCK at most; stops when every row is done."""
    model: CausalLM = nnx.merge(graphdef, weights)
    use_memory = decoding.state.has_memory

    def unfinished(carry: tuple) -> Array:
        decoding, _, step = carry
        return (step < count) & ~decoding.done.all()

    def body(carry: tuple) -> tuple:
        (state, done, keys), out, step = carry
        split = jax.vmap(jax.random.split)(keys)
        logits = model.project_logits(state.hidden)
        token = sample(logits, sampling, split[:, 1], state.seen)
        token = jnp.where(done, padding, token).astype(jnp.int32)
        live = ~done
        _, state, _ = model.forward_hidden(
            token[:, None],
            live.astype(jnp.int32)[:, None],
            cache=state,
            use_memory=use_memory,
        )
        assert state is not None
        out = lax.dynamic_update_index_in_dim(out, token, step, axis=1)
        return _Decoding(state, done | jnp.isin(token, stops), split[:, 0]), out, step + 1

    out = jnp.full((decoding.done.shape[0], LONGEST_BLOCK), padding, jnp.int32)
    decoding, out, _ = lax.while_loop(unfinished, body, (decoding, out, jnp.zeros((), jnp.int32)))
    return decoding, out
