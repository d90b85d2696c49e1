"""A check that token ids have rows in a model's embedding."""

from collections.abc import Callable

import numpy as np

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
      ValueError: if an id lies outside 0 to vocab_size - 1.
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
