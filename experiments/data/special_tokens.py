"""The beginning-of-sequence and end-of-sequence tokens."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


def begin_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    begin = cast("int | None", tokenizer.bos_token_id)  # wider types come from a common base
    return [begin] if begin is not None and tokenizer("a")["input_ids"][0] == begin else []


def drop_repeated_bos(tokenizer: "PreTrainedTokenizerFast", tokens: list[int]) -> list[int]:
    """Drops repeated beginning-of-sequence tokens at the start.

    A rendered chat has its own, and the tokenizer or the template adds another.
    """
    begin = tokenizer.bos_token_id
    count = next((i for i, token in enumerate(tokens) if token != begin), len(tokens))
    return tokens[max(count - 1, 0) :]


def end_token(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The end-of-sequence token, if the tokenizer has one."""
    return cast("int | None", tokenizer.eos_token_id)
