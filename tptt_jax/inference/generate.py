"""Generation: prefill in segments and decoding in blocks, each compiled once."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, HostTokens, Int, Key, SegmentIds, Tokens
from tptt_jax.decoder import Cache
from tptt_jax.inference.sampling import Sampling, sample
from tptt_jax.model import CausalLM, init_cache

PREFILL_TOKENS = 256
DECODE_STEPS = 16
_SMALLEST_CACHE = 512


class GenerateResult(NamedTuple):
    """What was generated.

    Attributes:
      tokens: [B, max_new_tokens] int32; after a row's stop token, padding.
      lengths: tokens of each row, the stop token included [B].
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]


class _Decoding(NamedTuple):
    """What decoding carries from token to token."""

    cache: Cache
    token: Array  # [B]: chosen, not yet in the cache
    done: Array  # [B]: whether the row has had its stop token
    key: Array


def generate(
    model: CausalLM,
    tokens: Tokens | HostTokens,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    segment_ids: SegmentIds | HostTokens | None = None,
    stop_tokens: tuple[int, ...] | None = None,
    use_memory: bool = True,
) -> GenerateResult:
    """Continues prompts.

    Compiled once for prefill and once for decoding, whatever the lengths: prompts are
    read in segments of 256 tokens, caches grow in powers of two.

    Args:
      model: a base model or a Titan.
      tokens: prompts [B, T] int32.
      max_new_tokens: how many to add at most.
      temperature: 0 is greedy.
      key: randomness for temperature > 0; None: jax.random.key(0).
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens with this probability together.
      segment_ids: 0 marks padding, anywhere in a row [B, T]; None: none.
      stop_tokens: end a row; None: the model's end-of-text tokens.
      use_memory: False leaves the memory out.

    Returns:
      The new tokens, without the prompt.

    Raises:
      ValueError: if a prompt is empty or an argument is out of range.
    """
    blocks = list(
        stream(
            model,
            tokens,
            max_new_tokens,
            temperature,
            key,
            top_k=top_k,
            top_p=top_p,
            segment_ids=segment_ids,
            stop_tokens=stop_tokens,
            use_memory=use_memory,
        )
    )
    stops = model.config.eos_token_ids if stop_tokens is None else stop_tokens
    new = np.concatenate(blocks, axis=1)
    filled = np.full((new.shape[0], max_new_tokens), _padding_token(model), np.int32)
    filled[:, : new.shape[1]] = new
    ended = np.isin(filled, stops)
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, max_new_tokens)
    filled[np.arange(max_new_tokens) >= lengths[:, None]] = _padding_token(model)
    return GenerateResult(jnp.asarray(filled), jnp.asarray(lengths, jnp.int32))


def stream(
    model: CausalLM,
    tokens: Tokens | HostTokens,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    segment_ids: SegmentIds | HostTokens | None = None,
    stop_tokens: tuple[int, ...] | None = None,
    use_memory: bool = True,
    block: int = DECODE_STEPS,
) -> Iterator[np.ndarray]:
    """`generate`, block by block: yields new tokens [B, n], n at most `block`.

    Ends early once every row has had its stop token; what follows a stop token in a
    row is padding.
    """
    prompts, counts = _left_aligned(tokens, segment_ids)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    stops = model.config.eos_token_ids if stop_tokens is None else stop_tokens
    graphdef, state = nnx.split(model)
    static = {"graphdef": graphdef, "use_memory": use_memory}
    capacity = _cache_size(int(counts.max()) + max_new_tokens)
    cache = init_cache(model, prompts.shape[0], capacity)
    hidden = jnp.zeros((prompts.shape[0], model.config.embed_dim), model.dtype)
    for start in range(0, prompts.shape[1], PREFILL_TOKENS):
        part = prompts[:, start : start + PREFILL_TOKENS]
        valid = (np.arange(start, start + PREFILL_TOKENS) < counts[:, None]).astype(np.int32)
        cache, hidden = _prefill(
            **static, state=state, tokens=part, ids=valid, cache=cache, last=hidden
        )
    stop_array = jnp.asarray(stops or (-1,), jnp.int32)
    first, next_key = _first_token(
        graphdef, state, hidden, sampling, jax.random.key(0) if key is None else key
    )
    decoding = _Decoding(cache, first, jnp.isin(first, stop_array), next_key)
    yield np.asarray(first)[:, None]
    left = max_new_tokens - 1
    while left > 0 and not bool(decoding.done.all()):
        count = min(block, left)
        decoding, new = _decode(
            **static,
            size=block,
            state=state,
            decoding=decoding,
            sampling=sampling,
            stops=stop_array,
            padding=_padding_token(model),
            count=count,
        )
        yield np.asarray(new)[:, :count]
        left -= count


def _left_aligned(
    given: Tokens | HostTokens, segment_ids: SegmentIds | HostTokens | None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts without padding before or inside them, as whole segments, and their lengths."""
    tokens = np.asarray(given, np.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape [B, T], got {tokens.shape}.")
    valid = np.ones(tokens.shape, bool) if segment_ids is None else np.asarray(segment_ids) != 0
    counts = valid.sum(axis=1)
    if tokens.shape[0] == 0 or not counts.all():
        raise ValueError("every prompt needs at least one token: start it with the BOS token.")
    order = np.argsort(~valid, axis=1, kind="stable")
    width = -(-int(counts.max()) // PREFILL_TOKENS) * PREFILL_TOKENS
    aligned = np.zeros((tokens.shape[0], width), np.int32)
    kept = min(width, tokens.shape[1])
    aligned[:, :kept] = np.take_along_axis(tokens, order, axis=1)[:, :kept]
    return aligned, counts


def _cache_size(tokens: int) -> int:
    size = _SMALLEST_CACHE
    while size < tokens:
        size *= 2
    return size


def _padding_token(model: CausalLM) -> int:
    config = model.config
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0


@functools.partial(jax.jit, static_argnames=("graphdef", "use_memory"), donate_argnames="cache")
def _prefill(
    graphdef: nnx.GraphDef,
    use_memory: bool,
    state: nnx.State,
    tokens: Array,
    ids: Array,
    cache: Cache,
    last: Array,
) -> tuple[Cache, Array]:
    """One segment; `last` is replaced in rows whose prompt has tokens in it."""
    model: CausalLM = nnx.merge(graphdef, state)
    hidden, new_cache, _ = model.forward_hidden(tokens, ids, cache=cache, use_memory=use_memory)
    assert new_cache is not None
    count = jnp.sum(ids, axis=1)
    final = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return new_cache, jnp.where(count[:, None] > 0, final, last)


@functools.partial(jax.jit, static_argnames="graphdef")
def _first_token(
    graphdef: nnx.GraphDef, state: nnx.State, hidden: Array, sampling: Sampling, key: Array
) -> tuple[Array, Array]:
    model: CausalLM = nnx.merge(graphdef, state)
    key, draw = jax.random.split(key)
    return sample(model.project_logits(hidden), sampling, draw), key


@functools.partial(
    jax.jit, static_argnames=("graphdef", "use_memory", "size"), donate_argnames="decoding"
)
def _decode(
    graphdef: nnx.GraphDef,
    use_memory: bool,
    size: int,
    state: nnx.State,
    decoding: _Decoding,
    sampling: Sampling,
    stops: Array,
    padding: Array,
    count: Array,
) -> tuple[_Decoding, Array]:
    """Up to `size` tokens, `count` of them asked for; stops when every row is done."""
    model: CausalLM = nnx.merge(graphdef, state)

    def unfinished(carry: tuple) -> Array:
        decoding, _, step = carry
        return (step < count) & ~decoding.done.all()

    def body(carry: tuple) -> tuple:
        decoding, out, step = carry
        live = (~decoding.done).astype(jnp.int32)[:, None]
        hidden, cache, _ = model.forward_hidden(
            decoding.token[:, None], live, cache=decoding.cache, use_memory=use_memory
        )
        assert cache is not None
        key, draw = jax.random.split(decoding.key)
        token = sample(model.project_logits(hidden[:, 0]), sampling, draw)
        token = jnp.where(decoding.done, padding, token).astype(jnp.int32)
        done = decoding.done | jnp.isin(token, stops)
        out = lax.dynamic_update_index_in_dim(out, token, step, axis=1)
        return _Decoding(cache, token, done, key), out, step + 1

    out = jnp.full((decoding.token.shape[0], size), padding, jnp.int32)
    decoding, out, _ = lax.while_loop(unfinished, body, (decoding, out, jnp.zeros((), jnp.int32)))
    return decoding, out
