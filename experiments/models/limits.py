"""Limits of a model's input: token ids in its embedding, rows within its learned positions."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from tptt_jax import ModelConfig
from tptt_jax.array_typing import Array, Int
from tptt_jax.token_ids import check_token_ids

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


def check_tokens(
    tokens: Int[np.ndarray, "..."],
    vocab_size: int,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> None:
    """Refuses ids without a row in the embedding; a look-up would return another row.

    Args:
      tokens: int32 ids of any shape.
      vocab_size: rows of the embedding.
      tokenizer: for the names of tokens; None: only ids are named.

    Raises:
      ValueError: if an id lies outside 0 to vocab_size - 1.
    """
    check_token_ids(tokens, vocab_size, functools.partial(_name, tokenizer))


def _name(tokenizer: "PreTrainedTokenizerFast | None", token: int) -> str:
    text = None if tokenizer is None or token < 0 else tokenizer.convert_ids_to_tokens(token)
    return str(token) if text is None else f"{token} ({text})"


def check_lengths(
    segment_ids: Int[np.ndarray, "n T"] | Array, config: ModelConfig, option: str
) -> None:
    """Refuses documents longer than the learned positions of a model.

    Args:
      segment_ids: of the rows; 0 is padding. Positions count from the start of each segment.
      config: of the model; with rotary embeddings any length is allowed.
      option: the option that shortens the rows.

    Raises:
      ValueError: if a segment is longer than `config.max_positions`.
    """
    if config.position_embedding != "learned":
        return
    ids = np.asarray(segment_ids)
    longest = int(_run_lengths(ids).max(initial=0))
    if longest > config.max_positions:
        raise ValueError(
            f"Rows have {longest} tokens, but this model has only {config.max_positions} learned "
            f"positions: lower {option} to {config.max_positions}."
        )


def _run_lengths(ids: Int[np.ndarray, "n T"]) -> Int[np.ndarray, " m"]:
    """Lengths of all segments of all rows, without padding."""
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    places = np.flatnonzero(starts)
    lengths = np.diff(places, append=ids.size)
    return lengths[ids.reshape(-1)[places] != 0]
