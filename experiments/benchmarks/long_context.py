"""``python -m experiments.bench context``: a window and a memory against full softmax."""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convert import load_tokenizer
from experiments.benchmarks.context_measurements import measure_contexts
from experiments.benchmarks.context_report import Runs, describe, read_peer, write_context_report
from experiments.benchmarks.random_models import ModelChoice
from experiments.benchmarks.timing import Options, machine
from experiments.data.prompts import document_tokens
from experiments.process.compilation_cache import prepare_process
from tptt_jax import LizaConfig


@dataclass(frozen=True, kw_only=True)
class ContextWork(ModelChoice):
    """Contexts to read and to decode from."""

    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144)
    """Context lengths in tokens, ascending; they include the tokens decoded at the end."""
    data: Path | None = None
    """UTF-8 text to read, repeated as often as needed; None: random tokens."""
    window: int = 1024
    """Window of softmax attention, in tokens; with --no-liza it has no memory beside it."""
    new_tokens: int = 96
    """Tokens decoded at the end of each context."""
    full_read_limit: int = 16384
    """Longest context that full softmax, whose prefill is quadratic, reads."""
    no_full: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measures the Titan alone."""

    def __post_init__(self) -> None:
        """Rejects contexts that do not ascend or are too short."""
        super().__post_init__()
        if self.new_tokens < 64:
            raise ValueError(f"new_tokens must be at least 64, got {self.new_tokens}.")
        ascending = sorted(set(self.contexts))
        if not ascending or list(self.contexts) != ascending or ascending[0] <= self.new_tokens:
            raise ValueError(
                f"contexts must ascend from more than {self.new_tokens}, got {self.contexts}."
            )
        if self.data is not None and self.random_weights is not None:
            raise ValueError("--random-weights has no tokenizer: leave out --data.")


def bench_context(
    work: Options[ContextWork],
    peer_json: tuple[Path, ...] = (),
    output: Path = Path("runs/context"),
) -> dict[str, Any]:
    """Measures a Titan with a window against full softmax as the context grows.

    Rewrites context.json and context.png after every context.

    Args:
      work: what is measured.
      peer_json: measurements of other programs, to draw in the same picture; see
        tests/parity/transformers_context.py.
      output: directory for both files.
    """
    peers: Runs = {}
    for path in peer_json:
        peers |= read_peer(path)
    prepare_process()
    workload = dataclasses.asdict(work) | {"data": None if work.data is None else str(work.data)}
    about = {"bench": "context", **machine(), "model": work.name, "dtype": work.dtype}
    about |= {"workload": workload}
    # Draw before measuring, so that the memory of matplotlib counts for no context.
    report = write_context_report(output, peers, about)
    tokens, runs = _context_tokens(work), {}
    memory = work.memory(work.window)
    name = f"window {work.window}, no memory" if work.no_liza else f"Titan, window {work.window}"
    kinds = {name: memory} if work.no_full else {name: memory, "full softmax": None}
    for name, liza in kinds.items():
        runs[name] = []
        for result in _contexts(work, liza, tokens):
            runs[name].append(result)
            print(f"{name}: {describe(result)}", file=sys.stderr, flush=True)
            report = write_context_report(output, runs | peers, about)
    return report


def _contexts(
    work: ContextWork, liza: LizaConfig | None, tokens: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Measures one kind of attention; its model is freed before the next one is built."""
    model = work.load(liza)
    yield from measure_contexts(
        model,
        tokens % model.config.vocab_size,
        work.contexts,
        new_tokens=work.new_tokens,
        read_limit=work.contexts[-1] if liza is not None else work.full_read_limit,
        use_memory=liza is not None and not work.no_liza,
    )


def _context_tokens(work: ContextWork) -> np.ndarray:
    count = work.contexts[-1]
    if work.data is None:
        return np.random.default_rng(0).integers(10, 5000, count)
    assert work.model is not None
    pieces = document_tokens(load_tokenizer(work.model), work.data)
    return np.resize(np.concatenate(list(pieces)), count)
