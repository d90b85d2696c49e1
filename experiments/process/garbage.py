"""The frequency of garbage collection in a command's process."""

import atexit
import gc


def collect_seldom() -> None:
    """Lets Python's cyclic collector run a hundred times less often than by default.

    Imports, a tokenizer and traced programs are millions of permanent objects. Scanning them
    repeatedly, and once more at exit, took a fifth of the time to a first token. Arrays are freed
    by reference counts, independent of the collector.
    """
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.freeze)
