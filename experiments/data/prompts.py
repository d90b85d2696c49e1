"""Tokenises texts, files of any size and conversations for generation."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.formats.files import check_regular
from experiments.data.special_tokens import begin_tokens, drop_repeated_bos, end_token
from experiments.data.templates import ChatTemplate
from experiments.data.text_files import open_text
from tptt_jax.array_typing import Int
from tptt_jax.inference.prefill import CALL_TOKENS

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_CHARACTERS_AT_A_TIME = 1 << 18
# A text can be cut where a line begins with a letter and tokenised in pieces, if the tokenizer
# adds nothing to the beginning of a text.
_PROBE = ("One line of text.\n", "Another line.\n\n", "And a paragraph.")


def check_text_file(path: Path) -> None:
    """Refuses what cannot be read as a text file; call it before loading a model.

    A pipe without a writer would block for ever.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is a directory, a pipe, a device or a socket.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}; check the path of the text.")
    check_regular(path)


def read_text(path: Path) -> Iterator[str]:
    """The pieces of a text file, cut where a line begins with a letter.

    Raises:
      ValueError: if the file is not UTF-8 or the encoding of its byte-order mark, or it is no
        regular file.
    """
    check_text_file(path)
    left = ""
    with open_text(path) as file:
        while more := file.read(_CHARACTERS_AT_A_TIME):
            left += more
            end = _last_line_start(left)
            if end:
                yield left[:end]
                left = left[end:]
    if left:
        yield left


def document_tokens(
    tokenizer: "PreTrainedTokenizerFast", path: Path, *, begin: bool = True
) -> Iterator[Int[np.ndarray, " L"]]:
    """Tokens of a text file, in pieces that fill the reader's buffer.

    Memory does not depend on the size of the file, unless the tokenizer treats the beginning of a
    text specially and needs the whole text.

    Args:
      tokenizer: of the model.
      path: a UTF-8 text file.
      begin: start with the beginning-of-sequence token, if the tokenizer puts one before a text;
        one that the text itself begins with is not repeated, and left out where this is False.
    """
    texts: Iterable[str] = read_text(path)
    if not _may_be_cut(tokenizer):
        texts = ["".join(texts)]
    return _regroup(_token_lists(tokenizer, texts, begin=begin))


def text_tokens(
    tokenizer: "PreTrainedTokenizerFast", text: str, *, begin: bool = True
) -> Int[np.ndarray, " L"]:
    """Tokens of a short text, with the same beginning as `document_tokens`."""
    (tokens,) = _token_lists(tokenizer, [text], begin=begin)
    return np.asarray(tokens, np.int32)


def chat_tokens(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]], *, begin: bool = True
) -> list[int]:
    """A conversation as the chat template renders it, with the prompt of the assistant's next turn.

    Args:
      tokenizer: of the model.
      messages: with role and content.
      begin: False leaves out the beginning-of-sequence token, if the template writes one.

    Raises:
      ValueError: if there is no template or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "--chat needs a tokenizer with a chat template, and this model has none: use an "
            "instruction-tuned model."
        )
    try:
        text = ChatTemplate(tokenizer).render(messages, ask=True)
    except ValueError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = drop_repeated_bos(tokenizer, list(ids))
    return tokens if begin or tokens[:1] != [tokenizer.bos_token_id] else tokens[1:]


def chat_stops(tokenizer: "PreTrainedTokenizerFast", stops: tuple[int, ...]) -> tuple[int, ...]:
    """The model's end-of-text tokens, and the token that ends a turn in the template."""
    turn_ends = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>")
    known = tokenizer.get_vocab()
    found = {known[name] for name in turn_ends if name in known} | set(stops)
    end = end_token(tokenizer)
    return tuple(sorted(found if end is None else found | {end}))


def _last_line_start(text: str) -> int:
    """Start of the last line that begins with a letter; 0: there is none."""
    place = len(text)
    while (place := text.rfind("\n", 0, place)) >= 0:
        if text[place + 1 : place + 2].isalpha():
            return place + 1
    return 0


def _may_be_cut(tokenizer: "PreTrainedTokenizerFast") -> bool:
    def encode(text: str) -> list[int]:
        ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    return encode("".join(_PROBE)) == [token for part in _PROBE for token in encode(part)]


def _token_lists(
    tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str], *, begin: bool
) -> Iterator[list[int]]:
    start = begin_tokens(tokenizer)
    for number, text in enumerate(texts):
        # verbose=False: texts longer than the base model's context are intended.
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(ids)
        if number == 0:
            tokens = drop_repeated_bos(tokenizer, start + tokens)[0 if begin else len(start) :]
        yield tokens


def _regroup(pieces: Iterable[list[int]]) -> Iterator[Int[np.ndarray, " L"]]:
    """The same tokens, CALL_TOKENS at a time."""
    left: list[int] = []
    for piece in pieces:
        left += piece
        while len(left) > CALL_TOKENS:
            yield np.asarray(left[:CALL_TOKENS], np.int32)
            left = left[CALL_TOKENS:]
    if left:
        yield np.asarray(left, np.int32)
