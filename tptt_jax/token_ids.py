"""Token ids: rows of integers that a model's embedding has rows for."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from tptt_jax.array_checks import check_axes
from tptt_jax.array_typing import Int

_SHOWN = 3


def check_token_ids(
    tokens: Int[np.ndarray, "..."], vocab_size: int, name: Callable[[int], str] = str
) -> None:
    """Refuses ids without a row in the embedding; a look-up would return another row.

    Args:
      tokens: ids of any shape.
      vocab_size: rows of the embedding.
      name: name of an id in the error.

    Raises:
      ValueError: if an id lies outside of 0 to vocab_size - 1.
    """
    outside = np.unique(tokens[(tokens < 0) | (tokens >= vocab_size)]).tolist()
    if not outside:
        return
    names = list(map(name, outside[:_SHOWN]))
    if more := len(outside) - len(names):
        names.append(f"{more} more")
    raise ValueError(
        f"The embedding has rows for token ids 0 to {vocab_size - 1}, got {', '.join(names)}: use "
        "the tokenizer that came with the model, or resize its embedding first "
        "(resize_token_embeddings of transformers)."
    )


def token_rows(given: Any) -> Int[np.ndarray, "B T"]:
    """Token ids of prompts as int32; rows of a list must be equally long.

    Args:
      given: an array or nested lists of integers [B, T].

    Raises:
      ValueError: if there are no two axes, or anything but integers.
    """
    try:
        tokens = np.asarray(given)
    except ValueError:
        raise ValueError(
            "rows of tokens must be equally long ([B, T]): pad the shorter ones, and give "
            "segment_ids that are 0 there."
        ) from None
    if tokens.dtype.kind not in "iu" and tokens.size:
        raise ValueError(
            f"tokens must be integers ([B, T]), got {type(given).__name__} of {tokens.dtype}: "
            "encode text with the model's tokenizer."
        )
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape [B, T], got {tokens.shape}.")
    return tokens.astype(np.int32)


def check_model_tokens(tokens: Any, segment_ids: Any, vocab_size: int) -> None:
    """Checks what a model is called with; ids only outside of `jax.jit`, where they are known.

    Args:
      tokens: must be integers [B, T].
      segment_ids: [B, T], 0 for padding, whose ids do not matter; None: no padding.
      vocab_size: rows of the embedding.

    Raises:
      TypeError: if `tokens` is not an array.
      ValueError: if it is not of integers, not [B, T], or an id has no row in the embedding.
    """
    check_axes("tokens", tokens, "B T")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers ([B, T]), got {tokens.dtype}.")
    known = [x for x in (tokens, segment_ids) if x is not None]
    if any(isinstance(x, Tracer) or not _is_addressable(x) for x in known):
        return
    found = np.asarray(tokens)
    check_token_ids(
        found if segment_ids is None else found[np.asarray(segment_ids) != 0], vocab_size
    )


def _is_addressable(x: Any) -> bool:
    """Whether this process can read the whole array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable
