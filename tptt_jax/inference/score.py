"""Token losses of texts of any length, in bounded memory."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.decoder import DecodingState
from tptt_jax.inference.prefill import SEGMENT_TOKENS, check_positions
from tptt_jax.inference.state import grow_state
from tptt_jax.model import CausalLM, init_cache
from tptt_jax.ops.cross_entropy import token_cross_entropy
from tptt_jax.token_ids import check_token_ids


def token_losses(
    model: CausalLM, pieces: Iterable[Int[np.ndarray, " L"]], *, use_memory: bool = True
) -> Iterator[Float[np.ndarray, " L"]]:
    """Negative log-likelihood of every token after the first, given all before it.

    Texts are scored in segments of one length, padded at the end, so that one program serves all
    lengths; if layers have no window, one more is compiled whenever their cache doubles.

    Args:
      model: a base model or a Titan.
      pieces: consecutive parts of one text, of any length.
      use_memory: False leaves the memory out.

    Yields:
      Nats, float32, one for each token after the first; a segment at a time.

    Raises:
      ValueError: if the text is longer than the learned positions, or a token has no row in the
        embedding.
    """
    split = nnx.split(model)
    state = init_cache(model, 1, use_memory=use_memory, growable=True)
    read, left = 0, np.zeros(0, np.int32)
    for piece in pieces:
        check_token_ids(piece, model.config.vocab_size)
        left = np.concatenate([left, piece])
        # The last token of a segment is predicted from the one before it, so it stays.
        while len(left) > SEGMENT_TOKENS:
            state, losses = _score(model, split, state, read, left, SEGMENT_TOKENS)
            yield losses
            read, left = read + SEGMENT_TOKENS, left[SEGMENT_TOKENS:]
    if len(left) > 1:
        yield _score(model, split, state, read, left, len(left) - 1)[1]


def _score(
    model: CausalLM,
    split: tuple[nnx.GraphDef, nnx.State],
    state: DecodingState,
    read: int,
    tokens: np.ndarray,
    count: int,
) -> tuple[DecodingState, np.ndarray]:
    """Losses of `count` tokens after the first of `tokens`."""
    check_positions(model, read + count)
    state = grow_state(model, state, read + count)
    inputs, targets = np.zeros((2, 1, SEGMENT_TOKENS), np.int32)
    inputs[0, :count], targets[0, :count] = tokens[:count], tokens[1 : count + 1]
    state, losses = _score_segment(*split, state, inputs, targets, count)
    return state, np.asarray(losses)[0, :count]


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _score_segment(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    state: DecodingState,
    inputs: Array,
    targets: Array,
    count: Array,
) -> tuple[DecodingState, Array]:
    model: CausalLM = nnx.merge(graphdef, weights)
    valid = (jnp.arange(inputs.shape[1]) < count)[None].astype(jnp.int32)
    hidden, after, _ = model.forward_hidden(inputs, valid, cache=state, use_memory=state.has_memory)
    assert after is not None
    head, vocab_axis = model.head_matrix()
    losses = token_cross_entropy(
        hidden, head, targets, softcap=model.config.final_softcap, vocab_axis=vocab_axis
    )
    return after, losses
