"""Counts the programs that JAX compiles."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def count_compilations() -> Iterator[Counter[str]]:
    """Counts every compilation inside the block by the name of its function.

    Not only of jitted functions: operations on arrays outside of them are programs too.
    """
    counts: Counter[str] = Counter()

    def listen(event: str, duration: float, **about: Any) -> None:
        if event == _EVENT:
            name = about["fun_name"]
            counts[name.removeprefix("jit_").removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
