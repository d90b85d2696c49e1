"""Shares of right answers."""

import math
from collections.abc import Sequence

import numpy as np

from experiments.evaluation.blocks import Estimate
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, measured_columns


def right_shares(rows: Sequence[Row], results: Sequence[Result], **about: float) -> list[float]:
    """Shares of right answers, from 0 to 1, of the rows with these properties.

    Args:
      rows: all rows of a task.
      results: of the first rows; later ones may be missing.
      about: e.g. length=512.
    """
    return [
        result["right"]
        for row, result in zip(rows, results, strict=False)
        if about.items() <= row.about.items()
    ]


def shares_at(
    rows: Sequence[Row], results: Results, length: int
) -> tuple[list[str], dict[str, float]]:
    """Results for rows of one length: a cell and a mean for each measured column."""
    shares = {
        name: right_shares(rows, results[name], length=length) for name in measured_columns(results)
    }
    means = {name: float(np.mean(found)) for name, found in shares.items() if found}
    return [percent(found) for found in shares.values()], means


def percent(shares: Sequence[float]) -> str:
    """Their mean and its standard error, in percent; empty if there are none."""
    if not shares:
        return ""
    mean, error = Estimate.of(shares)
    return f"{100 * mean:.0f}" + ("" if math.isnan(error) else f" ± {100 * error:.0f}")


def percents_by_length(
    rows: Sequence[Row], results: Sequence[Result], lengths: Sequence[int]
) -> list[float]:
    """Mean percentage right at each length; NaN where nothing was measured."""
    shares = [right_shares(rows, results, length=length) for length in lengths]
    return [100 * float(np.mean(each)) if each else math.nan for each in shares]
