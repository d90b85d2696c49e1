"""Pictures of a run: its stages, and the memory's contribution by position."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.training.metrics import StepRecord, folder_metrics
from experiments.training.report import plot_run
from tptt_jax.durable import atomic_file

if TYPE_CHECKING:  # matplotlib takes seconds to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[float], list[float]]

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1a1a1a", "linewidth": 2.2},
    {"color": "#d94801", "linewidth": 2.2},
    {"color": "#08519c", "linewidth": 2.8, "marker": "o", "markersize": 4},
    {"color": "#31a354", "linewidth": 2.2, "marker": "o", "markersize": 4},
    {"color": "0.6", "linewidth": 1.5, "linestyle": "--"},
)


def plot_stages(output: Path, *, title: str, before: float | None, after: float | None) -> None:
    """Draws loss.png of training on text and fit.png of the stages before it.

    Args:
      output: the run's directory.
      title: of the pictures.
      before: held-out loss of the base model, in nats per token.
      after: the same after training.
    """
    if folder_metrics(output):
        metrics = output / "metrics.jsonl"
        plot_run(metrics, output / "loss.png", title=title, eval_before=before, eval_after=after)
    transfer, distill = (folder_metrics(output / name) for name in ("transfer", "distill"))
    if not transfer and not distill:
        return
    figure, axes = new_figure(2, height=3.6)
    _draw_gaps(axes[0], transfer)
    _draw_divergence(axes[1], distill)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    save_figure(figure, output / "fit.png")


def plot_memory(
    png: Path, lines: Mapping[str, Curve], *, window: int, title: str, summary: str = ""
) -> None:
    """Draws perplexity by position, a line for each state of the model.

    Args:
      png: the picture; an earlier one is replaced.
      lines: positions and perplexities by label.
      window: tokens that softmax attention sees; beyond it the lines separate.
      title: of the picture.
      summary: what it shows, in one line below the title.
    """
    figure, (axis,) = new_figure(1, height=5.2)
    for (label, (places, values)), style in zip(lines.items(), _STYLES, strict=False):
        # From shortly before the window's end, where all lines coincide.
        first = next((i for i, place in enumerate(places) if place >= window / 2), 0)
        axis.plot(places[first:], values[first:], label=label, **style)
    axis.axvline(window, color="0.5", linestyle=":", linewidth=1.5)
    axis.annotate(
        f" window of {window} tokens ends",
        xy=(window, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=9,
        color="0.35",
    )
    scale_tokens(axis, "position of the token in its text")
    scale_perplexity(axis)
    axis.legend(fontsize=9, framealpha=0.9, edgecolor="none")
    axis.set_title(title, loc="left", fontweight="bold", pad=24 if summary else None)
    axis.annotate(
        summary, xy=(0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points"
    )
    save_figure(figure, png)


def scale_tokens(axis: "Axes", label: str) -> None:
    """Scales the x axis to numbers of tokens, in powers of two."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.set_xlabel(label)


def scale_perplexity(axis: "Axes") -> None:
    """Scales the y axis to perplexities, in plain numbers."""
    axis.set_yscale("log")
    for which in ("major", "minor"):
        getattr(axis.yaxis, f"set_{which}_formatter")(lambda y, _: f"{y:.4g}")
    axis.set_ylabel("perplexity, lower is better")


def _draw_gaps(axis: "Axes", records: list[StepRecord]) -> None:
    axis.set_title("attention transfer: gap left", loc="left", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel("error over that of the window alone")
    gaps = np.array([record.gap_left for record in records if record.gap_left is not None])
    if not len(gaps):
        return
    steps = [record.step for record in records if record.gap_left is not None]
    gaps = np.minimum(gaps, 2.0)
    axis.plot(steps, gaps, color="#9ecae1", linewidth=0.6)
    axis.plot(steps, gaps.mean(axis=1), color="#08519c", linewidth=2, label="mean of the layers")
    axis.axhline(1, color="#d94801", linestyle="--", linewidth=1.2, label="window alone")
    axis.set_ylim(0, min(2.0, gaps.max() * 1.05))
    axis.legend(fontsize=8, edgecolor="none")


def _draw_divergence(axis: "Axes", records: list[StepRecord]) -> None:
    axis.set_title("distillation: divergence from the base model", loc="left", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel("nats per token")
    if records:
        losses = [record.loss for record in records]
        axis.plot([record.step for record in records], losses, color="#08519c", linewidth=1.5)
        axis.set_ylim(bottom=0)


def new_figure(columns: int, *, height: float) -> "tuple[Figure, list[Axes]]":
    """A figure in the house style and its axes, side by side."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    # Titles may be paths: a "$" does not start a formula.
    rcParams["text.parse_math"] = False
    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(visible=True, color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", png: Path) -> None:
    """Writes a picture atomically."""
    with atomic_file(png) as temporary:
        figure.savefig(temporary, format="png")
