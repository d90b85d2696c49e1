"""Notices for the user about files left out and choices made."""

import sys


def print_notice(text: str) -> None:
    """Writes one line to stderr; stdout belongs to the results of a command."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)
