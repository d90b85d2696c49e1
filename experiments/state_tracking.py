"""``python -m experiments.state_tracking``: which states one linear-attention layer can track."""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.command_line import run_configured
from experiments.evaluation.store import RowStore, row_key
from experiments.process.compilation_cache import prepare_process
from experiments.process.output_folder import locked_output
from experiments.tracking.groups import GroupName
from experiments.tracking.model import Keys, Variant
from experiments.tracking.summary import (
    Curves,
    accuracy_report,
    accuracy_table,
    plot_accuracy,
    spans,
)
from experiments.tracking.trial import Training, Trial, run_trial
from tptt_jax.durable import atomic_file


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Trains one `LinearAttention` layer from scratch on the word problems of groups.

    The input is a sequence of random group elements, the target at each place their product so far.
    A layer that has learned the group generalises beyond the training length (arXiv:2411.12537,
    arXiv:2502.10297). There is no decay and no convolution.
    """

    groups: tuple[GroupName, ...] = ("parity", "s3")
    """"parity": two elements; "s3", "s4", "s5": the permutations of 3, 4 and 5 letters; "s5-2",
    "s5-3": of 5 letters, in words of the permutations that move at most 2 and 3 of them."""
    num_householder: tuple[int, ...] = (1, 2)
    """Householder steps per element."""
    beta_range: tuple[float, ...] = (1.0, 2.0)
    """Upper ends of the write gate's range. 1: a step can erase; 2: it can also flip a sign."""
    keys: tuple[Keys, ...] = ("own",)
    """Source of the keys of several steps. "own": learned for each step, as in DeltaProduct;
    "derivative", "rotary", "combined": derived from one key by the layer (TPTT)."""
    length: int = 64
    """Elements of a word in training."""
    short_length: int = 8
    """The same in the first half of the steps; a group is learned much faster on short words."""
    test_length: int = 256
    """Elements of a test word."""
    test_words: int = 128
    """Number of test words."""
    steps: int = 400
    """Training steps of each trial."""
    batch_size: int = 64
    """Words per step."""
    learning_rate: float = 5e-3
    """Peak learning rate of Adam."""
    dim: int = 64
    """Width of the layer's input and output."""
    heads: int = 8
    """Heads of the layer; each has dim / heads channels."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial values and words; one trial for each."""
    output: Path = Path("runs/states")
    """Directory for results.json, accuracy.png and trials.jsonl, from which an interrupted call
    resumes after the last finished trial."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        for name in ("groups", "num_householder", "beta_range", "keys", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none.")
        for name in ("length", "short_length", "test_words", "steps", "batch_size", "dim", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if min(self.num_householder) < 1:
            raise ValueError(f"num_householder must be at least 1, got {self.num_householder}.")
        if not all(0 < beta <= 2 for beta in self.beta_range):
            raise ValueError(f"beta_range must lie above 0 and at most at 2: {self.beta_range}.")
        if self.short_length > self.length:
            raise ValueError(
                f"short_length ({self.short_length}) must be at most length ({self.length})."
            )
        if self.test_length < self.length:
            raise ValueError(
                f"test_length ({self.test_length}) must be at least length ({self.length})."
            )
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads}).")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")

    @property
    def variants(self) -> list[Variant]:
        """The update rules without duplicates: with one step the source of keys does not matter."""
        every = itertools.product(self.num_householder, self.beta_range, self.keys)
        found = [Variant(n, beta, keys if n > 1 else "own") for n, beta, keys in every]
        return list(dict.fromkeys(found))

    @property
    def training(self) -> Training:
        """The settings of all trials."""
        names = [field.name for field in dataclasses.fields(Training)]
        return Training(**{name: getattr(self, name) for name in names})


def track_states(config: TrackingConfig) -> dict[str, Any]:
    """Runs the missing trials, prints and writes the results; returns what --json prints."""
    prepare_process()
    with locked_output(config.output):
        return _track_states(config)


def _track_states(config: TrackingConfig) -> dict[str, Any]:
    console = Console(soft_wrap=True, highlight=False)
    store = RowStore(config.output / "trials.jsonl")
    curves: Curves = {
        group: {
            variant: np.array(
                [
                    _accuracy(config, store, console, Trial(group, variant, seed))
                    for seed in dict.fromkeys(config.seeds)
                ]
            )
            for variant in config.variants
        }
        for group in dict.fromkeys(config.groups)
    }
    lengths = {"length": config.length, "test_length": config.test_length}
    console.print(accuracy_table(curves, **lengths))
    result: dict[str, Any] = {"output": str(config.output), **lengths}
    result["trials"] = accuracy_report(curves, length=config.length)
    with atomic_file(config.output / "results.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot_accuracy(config.output / "accuracy.png", curves, length=config.length)
    console.print(f"results and picture are in {config.output}", markup=False)
    return result


def _accuracy(
    config: TrackingConfig, store: RowStore, console: Console, trial: Trial
) -> list[float]:
    """Accuracy at each position, read from an earlier call if that finished the trial."""
    training = config.training
    key = row_key(**dataclasses.asdict(trial), **dataclasses.asdict(training))
    result = store.get(key)
    if result is None:
        begin = time.perf_counter()
        accuracy = run_trial(trial, training).tolist()
        seconds = time.perf_counter() - begin
        result = {"trial": trial.label, "seconds": seconds, "accuracy": accuracy}
        store.add(key, result)
        parts = [
            f"{np.mean(accuracy[start:stop]):.3f} at {start + 1} to {stop}"
            for start, stop in spans(config.length, config.test_length)
        ]
        console.print(f"{trial.label}: {', '.join(parts)} ({seconds:.0f} s)", markup=False)
    return result["accuracy"]


def main() -> None:
    """The command."""
    sys.exit(
        run_configured(track_states, TrackingConfig, prog="python -m experiments.state_tracking")
    )


if __name__ == "__main__":
    main()
