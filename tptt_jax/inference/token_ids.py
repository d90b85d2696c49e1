"""Token ids that a model's embedding has rows for."""

from collections.abc import Callable

import numpy as np

from tptt_jax.array_typing import Int

_SHOWN = 3


def check_token_ids(
    tokens: Int[np.ndarray, "..."], vocab_size: int, name: Callable[[int], str] = str
) -> None:
    """Refuses ids that the embedding has no row for; looking them up would take another row.

    Args:
      tokens: ids of any shape.
      vocab_size: rows of the embedding.
      name: what an id is called in the error.

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
