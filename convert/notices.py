"""Lines for a person about what was left out or chosen, although nothing failed."""

import sys


def say(text: str) -> None:
    """Writes one line to stderr; stdout belongs to the results of a command."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)
