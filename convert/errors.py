"""The exception for inputs that cannot be converted."""

from collections.abc import Iterable


class ConversionError(ValueError):
    """A checkpoint, configuration or tokenizer that cannot be read or written as requested.

    The message says what was expected, what was found, and what to do; it is shown to the user
    unchanged.
    """


def listing(items: Iterable[str]) -> str:
    """Joins names for an error message, sorted so that the message is reproducible."""
    return ", ".join(sorted(items))
