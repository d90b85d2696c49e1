"""Results of the trials: accuracies by distance, a table, a picture."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments.evaluation.blocks import Estimate
from experiments.tracking.groups import GroupName, multiplication_table
from experiments.tracking.model import Variant
from experiments.training.pictures import new_figure, save_figure
from tptt_jax.array_typing import Float

Curves = Mapping[GroupName, Mapping[Variant, Float[np.ndarray, "S T"]]]
"""Accuracy of each seed at each position, by group and variant."""

_COLORS = ("#1a1a1a", "#d94801", "#31a354", "#08519c", "#807dba", "#e7298a", "0.6")


class Mean(NamedTuple):
    """A mean over seeds, and its standard error; None: only one seed."""

    value: float
    error: float | None

    def __str__(self) -> str:
        """The text for tables."""
        return f"{self.value:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


def spans(length: int, test_length: int) -> list[tuple[int, int]]:
    """Positions 0 to `length`, then spans that each end twice as far as the one before."""
    edges = [0, length]
    while edges[-1] < test_length:
        edges.append(min(2 * edges[-1], test_length))
    return list(pairwise(edges))


def chance(group: GroupName) -> float:
    """The accuracy of random guesses."""
    return 1 / len(multiplication_table(group))


def accuracies(curves: Float[np.ndarray, "S T"], length: int) -> dict[tuple[int, int], Mean]:
    """The accuracy in each of the `spans`."""
    means = {}
    for start, stop in spans(length, curves.shape[1]):
        value, error = Estimate.of(curves[:, start:stop].mean(axis=1))
        means[start, stop] = Mean(value, None if math.isnan(error) else error)
    return means


def accuracy_table(curves: Curves, *, length: int, test_length: int) -> Table:
    """A row for each group and variant."""
    table = Table(
        title=f"Accuracy of the product so far, by position; trained up to position {length}",
        title_justify="left",
    )
    for name in ("group", "update rule"):
        table.add_column(name)
    for start, stop in spans(length, test_length):
        table.add_column(f"{start + 1} to {stop}", justify="right")
    table.add_column("chance", justify="right")
    for group, variants in curves.items():
        for variant, found in variants.items():
            cells = map(str, accuracies(found, length).values())
            table.add_row(group, variant.label, *cells, f"{chance(group):.3f}")
    return table


def accuracy_report(curves: Curves, *, length: int) -> list[dict[str, Any]]:
    """The same for results.json."""
    return [
        {
            "group": group,
            "num_householder": variant.num_householder,
            "beta_max": variant.beta_max,
            "keys": variant.keys,
            "seeds": len(found),
            "chance": chance(group),
            "accuracy": [
                {"from": start + 1, "to": stop, "mean": mean.value, "standard_error": mean.error}
                for (start, stop), mean in accuracies(found, length).items()
            ],
        }
        for group, variants in curves.items()
        for variant, found in variants.items()
    ]


def plot_accuracy(png: Path, curves: Curves, *, length: int) -> None:
    """Draws accuracy by position, a panel for each group and a line for each variant.

    Args:
      png: the picture; an earlier one is replaced.
      curves: of all trials.
      length: last position of training, marked by a dashed line.
    """
    figure, axes = new_figure(len(curves), height=4.2)
    for axis, (group, variants) in zip(axes, curves.items(), strict=True):
        for i, (variant, found) in enumerate(variants.items()):
            color = _COLORS[i % len(_COLORS)]
            places = np.arange(1, found.shape[1] + 1)
            axis.plot(places, found.mean(axis=0), label=variant.label, color=color, linewidth=1.8)
        axis.axvline(length, color="0.4", linestyle="--", linewidth=1.2)
        axis.axhline(chance(group), color="0.6", linestyle=":", linewidth=1.2)
        axis.set_title(group, loc="left", fontweight="bold")
        axis.set_xlabel("position")
        axis.set_ylim(0, 1.04)
    axes[0].set_ylabel("accuracy (dotted: chance)")
    _add_legend(axes)
    save_figure(figure, png)


def _add_legend(axes: Sequence[Any]) -> None:
    """Adds one legend for all panels, below them."""
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(3, len(labels))
    axes[0].figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9, edgecolor="none"
    )
