"""Tokenises texts in which only some characters count in the loss."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.packing import Example
from experiments.data.special_tokens import drop_repeated_bos

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

# Offsets are Python tuples: those of a whole data set would not fit in memory.
_TOKENIZE_AT_ONCE = 1000


class MarkedText(NamedTuple):
    """A text and which of its characters count in the loss."""

    text: str
    targets: list[tuple[int, int]]
    """(start, end) of each piece."""


def marked_examples(
    tokenizer: "PreTrainedTokenizerFast", marked: Sequence[MarkedText], *, special_tokens: bool
) -> Iterator[Example]:
    """Tokenises whole texts, so that tokens equal those of running text, and marks the targets.

    Args:
      tokenizer: of the model.
      marked: the texts.
      special_tokens: add the tokens that the tokenizer puts around a text.
    """
    for some in portions(marked):
        with _whole_offsets(tokenizer):
            encoded = tokenizer(
                [text for text, _ in some],
                add_special_tokens=special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
        places = zip(encoded["input_ids"], encoded["offset_mapping"], some, strict=True)
        for ids, offsets, (text, targets) in places:
            kept = drop_repeated_bos(tokenizer, ids)
            example = all_targets(np.asarray(kept, dtype=np.int32))
            if targets != [(0, len(text))]:
                places_of = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
                inside = _inside(places_of[len(ids) - len(kept) :], targets)
                example = Example(example.tokens, example.targets & inside)
            yield example


def check_characters(text: str) -> str:
    """The text itself.

    Raises:
      ValueError: if it holds half a surrogate pair, which has no tokens; JSON escapes allow that.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half of a surrogate pair ({text[error.start]!a}) is not a character: repair or "
            "remove the row."
        ) from None
    return text


def all_targets(tokens: Int[np.ndarray, " L"]) -> Example:
    """An example in which all tokens count except the first, which has no prediction."""
    return Example(tokens, np.arange(len(tokens)) > 0)


def portions(items: Sequence[Any]) -> Iterable[list[Any]]:
    """The items, in groups that are tokenised together."""
    for start in range(0, len(items), _TOKENIZE_AT_ONCE):
        yield list(items[start : start + _TOKENIZE_AT_ONCE])


def _inside(offsets: Int[np.ndarray, "L 2"], targets: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens overlap a target; a token without characters counts by its position."""
    starts, ends = offsets.T
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in targets:
        inside |= (np.maximum(ends, starts + 1) > start) & (starts < end)
    return inside & ~((starts == 0) & (ends == 0))  # the tokens around a text


@contextmanager
def _whole_offsets(tokenizer: "PreTrainedTokenizerFast") -> Iterator[None]:
    """Makes offsets include leading blanks, which post-processors such as RoBERTa's trim."""
    backend = tokenizer.backend_tokenizer
    before: Any = backend.post_processor
    settings = b"" if before is None else before.__getstate__()
    whole = settings.replace(b'"trim_offsets":true', b'"trim_offsets":false')
    if whole == settings:
        yield
        return
    # The package has no constructor from JSON, but pickles a post-processor as JSON.
    after: Any = copy.deepcopy(before)
    after.__setstate__(whole)
    try:
        backend.post_processor = after
        yield
    finally:
        backend.post_processor = before
