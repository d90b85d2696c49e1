"""The one exception that means "this input cannot be converted"."""

from collections.abc import Iterable


class ConversionError(ValueError):
    """A checkpoint, configuration or tokenizer that cannot be read or written as asked.

    The message names what was expected, what came, and what to do; it is meant to be shown to
    the user as it is.
    """


def listing(items: Iterable[str]) -> str:
    """Joins names for an error message, sorted so that the message is reproducible."""
    return ", ".join(sorted(items))
