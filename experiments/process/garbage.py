"""How often a command's process looks for garbage."""

import atexit
import gc


def collect_seldom() -> None:
    """Lets Python's cyclic collector run a hundred times less often than by default.

    Imports, a tokenizer and traced programs are millions of objects that all stay. Looking
    through them again and again, and once more at the end, took a fifth of the time to a first
    token. Arrays are freed by reference counts, whatever the collector does.
    """
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.freeze)
