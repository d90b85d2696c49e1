"""Incremental decoding of tokens to text."""

from collections.abc import Callable, Sequence
from typing import Any

# Any, because the declared result of a tokenizer's decode also includes lists of texts.
Decode = Callable[[list[int]], Any]


def check_stop_strings(strings: Sequence[str]) -> None:
    """Raises ValueError if one of them is empty, or they are a single string."""
    if isinstance(strings, str) or not all(strings):
        raise ValueError(f"stop_strings must be non-empty strings, got {strings!r}.")


class TextStream:
    """The text of one row, cut exactly before the first stop string.

    Tokens are decoded a few at a time, each together with those before it, so that
    characters and spaces that span tokens stay whole.

    Example:
      >>> text = TextStream(lambda tokens: "".join(map(chr, tokens)), ("END",))
      >>> text.push([72, 105, 69]), text.push([78, 68, 33]), text.stopped, text.num_tokens
      ('Hi', '', True, 5)
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()) -> None:
        """Starts with no text.

        Args:
          decode: from tokens to text.
          stop_strings: the first of these to appear ends the text and is not part of it.

        Raises:
          ValueError: if a stop string is empty.
        """
        check_stop_strings(stop_strings)
        self._decode, self._stops = decode, tuple(stop_strings)
        self._tokens: list[int] = []
        # Text is decoded from `_first` on; the text of tokens before `_next` is already returned.
        self._first = self._next = 0
        self._held = ""
        self.text = ""
        self.stopped = False
        """Whether a stop string has come."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far; of a stopped text, up to the one that completed the stop string."""
        return len(self._tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that later tokens cannot change."""
        before = len(self.text)
        for token in tokens:
            if self.stopped:
                break
            self._tokens.append(token)
            self._take(final=False)
        return self.text[before:]

    def finish(self) -> str:
        """The text held back for an incomplete character or a possible stop string."""
        before = len(self.text)
        if not self.stopped:
            self._take(final=True)
            self.text += self._held
            self._held = ""
        return self.text[before:]

    def _take(self, *, final: bool) -> None:
        known = str(self._decode(self._tokens[self._first : self._next]))
        longer = str(self._decode(self._tokens[self._first :]))
        if not final and (longer.endswith("\ufffd") or len(longer) <= len(known)):
            return  # the last character is incomplete
        self._held += longer[len(known) :]
        self._first, self._next = self._next, len(self._tokens)
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.text += self._held[: min(found)]
            self._held, self.stopped = "", True
            return
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        self.text += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
