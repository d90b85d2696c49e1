"""Losses of tokens summed over blocks of positions: perplexities, differences and their errors."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Float

from experiments.evaluation.store import Result

# Tokens of a block: losses are summed over blocks, and errors are those of blocks.
BLOCK = 64


class Estimate(NamedTuple):
    """A number and its standard error, NaN if there are too few samples."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: Sequence[float] | Float[np.ndarray, " N"]) -> Self:
        """Mean of at least one independent sample."""
        error = math.nan
        if len(samples) > 1:
            error = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
        return cls(float(np.mean(samples)), error)

    def text(self, form: str = ".2f") -> str:
        """The number and its error, as far as they are known."""
        if math.isnan(self.value):
            return ""
        error = "" if math.isnan(self.error) else f" ± {self.error:{form.lstrip('+')}}"
        return f"{self.value:{form}}{error}"

    @property
    def report(self) -> dict[str, float | None]:
        """The value for results.json, which has no NaN."""
        error = None if math.isnan(self.error) else self.error
        return {"value": self.value, "standard_error": error}


class Blocks(NamedTuple):
    """Sums of blocks of all rows [rows, blocks], zero where a row is shorter."""

    nats: Float[np.ndarray, "R B"]
    counts: Float[np.ndarray, "R B"]

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Blocks":
        """Stacks the results of `block_sums`."""
        width = max(len(result["nats"]) for result in results)

        def stack(name: str) -> np.ndarray:
            return np.array([np.pad(r[name], (0, width - len(r[name]))) for r in results])

        return cls(stack("nats"), stack("counts"))

    @property
    def width(self) -> int:
        """Blocks of the longest row."""
        return self.nats.shape[1]

    def between(self, first: int, end: int | None) -> "Blocks":
        """The blocks of positions `first` to `end`, both multiples of the block length."""
        places = slice(first // BLOCK, None if end is None else -(-end // BLOCK))
        return Blocks(self.nats[:, places], self.counts[:, places])

    def perplexity(self, first: int, end: int | None) -> Estimate:
        """Perplexity and its standard error, which treats blocks as independent."""
        nats, counts = self.between(first, end)
        total = counts.sum()
        if not total:
            return Estimate(math.nan, math.nan)
        mean = float(nats.sum() / total)
        error = standard_error(nats - mean * counts, counts, total)
        value = math.exp(min(mean, 700.0))
        return Estimate(value, value * error)

    def curve(self) -> tuple[list[float], list[float]]:
        """Positions, and the perplexity there."""
        ends = list(intervals(self.width * BLOCK))
        points = [((a + b) / 2, self.perplexity(a, b).value) for a, b in ends]
        known = [(x, y) for x, y in points if not math.isnan(y)]
        return [x for x, _ in known], [y for _, y in known]


def block_sums(nats: Float[np.ndarray, " T"], counts: Float[np.ndarray, " T"]) -> Result:
    """The stored result of a row: summed losses and counted tokens of every block."""
    starts = np.arange(0, len(nats), BLOCK)
    sums = (np.add.reduceat(x.astype(np.float64), starts).tolist() for x in (nats, counts))
    return dict(zip(("nats", "counts"), sums, strict=True))


def text_sums(losses: Float[np.ndarray, " T"]) -> Result:
    """The same for a text, whose first token has no prediction."""
    return block_sums(np.pad(losses, (1, 0)), np.pad(np.ones(len(losses)), (1, 0)))


def recovered_gap(full: Blocks, alone: Blocks, this: Blocks) -> Estimate | None:
    """(window - this) / (window - full) in nats, with the error of paired blocks.

    None if they were measured on different rows, or the window loses nothing.
    """
    if not full.nats.shape == alone.nats.shape == this.nats.shape:
        return None
    gain, gap = alone.nats - this.nats, alone.nats - full.nats
    total = float(gap.sum())
    if total <= 1e-6 * float(full.counts.sum()):
        return None
    value = float(gain.sum()) / total
    return Estimate(value, standard_error(gain - value * gap, full.counts, total))


def difference(this: Blocks, other: Blocks) -> Estimate:
    """`this` - `other` in nats for each token of the same rows, with the error of paired blocks."""
    gap, total = this.nats - other.nats, this.counts.sum()
    mean = float(gap.sum() / total)
    return Estimate(mean, standard_error(gap - mean * this.counts, this.counts, total))


def standard_error(residuals: np.ndarray, counts: np.ndarray, total: float) -> float:
    """Standard error of a quotient by `total`, from the residuals of blocks of `counts` tokens."""
    used = np.count_nonzero(counts)
    return float(np.sqrt((residuals**2).sum()) / total) if used > 1 else math.nan


def intervals(length: int) -> Iterator[tuple[int, int]]:
    """0 to 64, to 128, to 256, ..."""
    edges = [0, *itertools.takewhile(lambda e: e < length, (BLOCK << i for i in itertools.count()))]
    return itertools.pairwise([*edges, length])
