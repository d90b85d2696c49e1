"""Regular expressions from files: invalid ones are refused, and matching has a time limit."""

import functools
import re
import time

import regex

_SECONDS = 2.0
# Shorter matches cost nothing, however many there are.
_FREE_SECONDS = 0.01
# An escape, or a brace that opens no quantifier of `re`: text there, fuzzy matching in `regex`.
_ESCAPE_OR_BRACE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?![0-9]+\}|[0-9]*,[0-9]*\})", re.DOTALL)


def check_pattern(pattern: str) -> None:
    """Raises ValueError, with the reason, if Python's `re` cannot compile a pattern."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a valid regular expression: {error}") from None


def matches_whole(pattern: str, text: str) -> bool:
    """Whether a pattern matches a whole text, in bounded time.

    Args:
      pattern: a regular expression of Python's `re`.
      text: the text.

    Raises:
      ValueError: if its matches take seconds, as nested quantifiers may.
    """
    return _compile(pattern).matches(text)


class _Bounded:
    """A pattern whose matches share a budget of time.

    `re` cannot be stopped; `regex` looks at the clock while it matches.
    """

    def __init__(self, pattern: str):
        self._text = pattern
        try:
            self._pattern = regex.compile(_escape_braces(pattern))
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r:.200} is not a regular expression: {error}.") from None
        self._seconds = _SECONDS

    def matches(self, text: str) -> bool:
        begin = time.thread_time()
        try:
            if self._seconds <= 0:
                raise TimeoutError
            return self._pattern.fullmatch(text, timeout=self._seconds) is not None
        except TimeoutError:
            self._seconds = 0.0
            raise ValueError(
                f"the regular expression {self._text!r:.200} takes longer than {_SECONDS:g} s to "
                "match; write it without a quantifier inside another, or list names."
            ) from None
        finally:
            spent = time.thread_time() - begin
            if spent > _FREE_SECONDS:
                self._seconds -= spent


def _escape_braces(pattern: str) -> str:
    return _ESCAPE_OR_BRACE.sub(lambda found: found[1] or r"\{", pattern)


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> _Bounded:
    return _Bounded(pattern)
