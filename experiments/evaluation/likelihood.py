"""Log-likelihoods of continuations, in batches of a few shapes."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tptt_jax import CausalLM
from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.ops.cross_entropy import LOGITS_AT_A_TIME
from tptt_jax.token_ids import check_token_ids

_SHORTEST = 64
# Most tokens of one call, so that activations of long texts fit in memory.
_CALL_TOKENS = 8192
# Tokens of a continuation that are scored, rounded up.
_PLACES = (16, 128, 1024)


class Continuation(NamedTuple):
    """Tokens to score, and at least one token before them."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """Log-likelihood of a continuation.

    Attributes:
      nats: its log-probability.
      is_greedy: whether each of its tokens is the most likely one.
    """

    nats: float
    is_greedy: bool


def score_continuations(
    model: CausalLM,
    continuations: Sequence[Continuation],
    *,
    batch_size: int,
    max_length: int,
    use_memory: bool,
    report: Callable[[int], object] = lambda count: None,
) -> list[Likelihood]:
    """Log-likelihood of each continuation, given its context.

    Continuations that differ in their last token only, such as the letters of a question, share a
    row. Rows are sorted by length and padded to a few lengths, so few programs are compiled.

    Args:
      model: a base model or a Titan.
      continuations: in any order.
      batch_size: most rows at a time.
      max_length: most tokens of a row that the model reads; longer contexts lose their beginning.
      use_memory: False leaves the memory out.
      report: called with the number of continuations scored since the last call.

    Raises:
      ValueError: if a continuation is longer than `max_length`, `max_length` exceeds the learned
        positions, or a token has no row in the embedding.
    """
    rows: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    config = model.config
    if config.position_embedding == "learned" and max_length > config.max_positions:
        raise ValueError(
            f"rows of {max_length} tokens are longer than the {config.max_positions} positions "
            "that this model has learned: lower the maximum length."
        )
    for index, each in enumerate(continuations):
        check_token_ids(np.asarray([*each.context, *each.tokens]), config.vocab_size)
        if len(each.tokens) > max_length:
            raise ValueError(
                f"a continuation has {len(each.tokens)} tokens, more than the maximum length of "
                f"{max_length}: raise it."
            )
        rows[_inputs(each, max_length)].append(index)
    scores = [Likelihood(0.0, is_greedy=True)] * len(continuations)
    order = sorted(rows, key=len, reverse=True)
    while order:
        length = min(padded_length(len(order[0])), max_length)
        size = max(1, min(batch_size, _CALL_TOKENS // length))
        batch, order = order[:size], order[size:]
        members = [[continuations[i] for i in rows[inputs]] for inputs in batch]
        found = _score_rows(model, batch, members, (size, length), use_memory=use_memory)
        for inputs, likelihoods in zip(batch, found, strict=True):
            for index, likelihood in zip(rows[inputs], likelihoods, strict=True):
                scores[index] = likelihood
        report(sum(map(len, members)))
    return scores


def pad_prompts(
    prompts: Sequence[Sequence[int]], size: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Prompts as the rows of one array, and segment ids: 1 on their tokens, 0 on padding.

    The last prompt is repeated up to `size` rows: another number of rows would recompile.
    """
    tokens, valid = np.zeros((2, size, max(map(len, prompts))), np.int32)
    for row in range(size):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, 1
    return tokens, valid


def padded_length(count: int) -> int:
    """The length to which a row of `count` tokens is padded: 64, 96, 128, 192, 256, ..."""
    length = _SHORTEST
    while length < count:
        if 3 * length // 2 >= count:
            return 3 * length // 2
        length *= 2
    return length


def _inputs(continuation: Continuation, max_length: int) -> tuple[int, ...]:
    """The model's input: all but the last token, at most the last `max_length`."""
    return (*continuation.context, *continuation.tokens)[-max_length - 1 : -1]


def _score_rows(
    model: CausalLM,
    batch: Sequence[tuple[int, ...]],
    members: Sequence[Sequence[Continuation]],
    shape: tuple[int, int],
    *,
    use_memory: bool,
) -> list[list[Likelihood]]:
    """Likelihoods of the continuations of every row, padded to `shape` [B, T]."""
    tokens, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
    for row, inputs in enumerate(batch):
        tokens[row, : len(inputs)], lengths[row] = inputs, len(inputs)
    needed = max(len(each.tokens) - 1 for row in members for each in row)
    places = next((size for size in _PLACES if size >= needed), shape[1])
    arrays = jax.device_put((tokens, lengths))
    nats, is_likeliest, last = jax.device_get(
        _score(model, *arrays, places=min(places, shape[1]), use_memory=use_memory)
    )

    def likelihood(row: int, continuation: Continuation) -> Likelihood:
        count = len(continuation.tokens)
        if not count:
            return Likelihood(0.0, is_greedy=True)
        # The last places of a row are the ones before its end.
        before = slice(nats.shape[1] - count + 1, None)
        end = continuation.tokens[-1]
        total = float(nats[row, before].sum(dtype=np.float64)) + float(last[row, end])
        greedy = bool(is_likeliest[row, before].all()) and int(last[row].argmax()) == end
        return Likelihood(total, greedy)

    return [[likelihood(row, each) for each in some] for row, some in enumerate(members)]


@functools.partial(nnx.jit, static_argnames=("places", "use_memory"))
def _score(
    model: CausalLM,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    places: int,
    use_memory: bool,
) -> tuple[Float[Array, "B N"], Array, Float[Array, "B V"]]:
    """Scores of the last `places` tokens of each row, and of all that may follow it.

    Returns:
      Log-probabilities of those tokens [B, N], whether each is the most likely one [B, N], and
      log-probabilities of the next token [B, V]. Float32; values before a row's start are
      meaningless.
    """
    # Tokens after a row's end do not affect earlier ones.
    hidden, _, _ = model.forward_hidden(tokens, use_memory=use_memory)
    ends = lengths[:, None] - 1
    indices = jnp.maximum(ends - places + jnp.arange(places), 0)
    targets = jnp.take_along_axis(tokens, indices + 1, axis=1, mode="clip")

    def score_token(some: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.project_logits(some[0]).astype(jnp.float32)
        nats = logits[some[1]] - jax.nn.logsumexp(logits)
        return nats, jnp.argmax(logits) == some[1]

    def take(places: Array) -> Array:
        return jnp.take_along_axis(hidden, places[..., None], axis=1)

    nats, is_likeliest = lax.map(
        score_token,
        (take(indices).reshape(-1, hidden.shape[-1]), targets.reshape(-1)),
        batch_size=max(1, LOGITS_AT_A_TIME // model.config.vocab_size),
    )
    last = model.project_logits(take(ends))[:, 0].astype(jnp.float32)
    shape = targets.shape
    return nats.reshape(shape), is_likeliest.reshape(shape), jax.nn.log_softmax(last)
