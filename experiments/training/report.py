"""Progress and plots of a run."""

import datetime
import math
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.training.metrics import StepRecord, read_metrics
from tptt_jax.durable import atomic_file

if TYPE_CHECKING:  # matplotlib takes seconds to import
    from matplotlib.axes import Axes

_PLAIN_SECONDS = 10.0
_RECENT_STEPS = 20
_LEGEND: dict[str, Any] = {"fontsize": 9, "framealpha": 0.9, "edgecolor": "none"}


class TrainingProgress:
    """Shows a run's steps: a bar on a terminal, else occasional lines.

    Use it as a context manager, so that the terminal is restored.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        title: str = "step",
    ) -> None:
        """Prepares for the steps after `first_step`, up to `total_steps`, under a title."""
        self._total = total_steps
        self._title = title
        self._first = first_step
        self._console = console or Console()
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last_line = -math.inf
        self._bar = Progress(
            TextColumn(title + " {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=first_step)

    def __enter__(self) -> Self:
        """Shows the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the bar and restores the cursor."""
        self._bar.stop()

    def update(self, record: StepRecord) -> None:
        """Shows a finished step."""
        if record.step > self._first + 1:  # the first one compiles, so its time is not typical
            self._recent.append(record.seconds)
        text = self._describe(record)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=record.step, description=text)
            return
        now = time.monotonic()
        ends = record.step in (self._first + 1, self._total)
        if ends or now - self._last_line >= _PLAIN_SECONDS:
            self._last_line = now
            self.note(f"{self._title} {record.step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Prints a separate line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, record: StepRecord) -> str:
        name = "loss" if record.gap_left is None else "gap left"
        parts = [f"{name} {record.loss:.3f}"]
        if record.mu_mean is not None:
            parts.append(f"mu {record.mu_mean:.3f}")
        parts.append(f"{record.tokens_per_s:,.0f} tokens/s")
        remaining = self._total - record.step
        if self._recent and remaining:
            seconds = round(remaining * sum(self._recent) / len(self._recent))
            parts.append(f"{datetime.timedelta(seconds=seconds)} left")
        return "  ".join(parts)


def plot_run(
    metrics_path: Path,
    png_path: Path,
    *,
    title: str = "Fine-tuning",
    eval_before: float | None = None,
    eval_after: float | None = None,
) -> None:
    """Draws loss and memory share over the steps of a run.

    Args:
      metrics_path: a file by `MetricsWriter`.
      png_path: the picture; an earlier one is replaced.
      title: of the picture.
      eval_before: held-out loss before training, in nats per token.
      eval_after: the same after training.

    Raises:
      ValueError: if there are no steps to draw.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Titles may be paths: a "$" does not start a formula.
    rcParams["text.parse_math"] = False

    steps = read_metrics(metrics_path)
    if not steps:
        raise ValueError(f"{metrics_path} holds no steps: train before plotting.")
    with_memory = steps[-1].mu_mean is not None
    figure = Figure(figsize=(9, 6.5 if with_memory else 4.5), dpi=150, layout="constrained")
    ratios = [2, 1] if with_memory else [1]
    axes = figure.subplots(
        len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    for axis in axes:
        axis.grid(visible=True, color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    _draw_loss(axes[0], steps, eval_before, eval_after)
    if with_memory:
        _draw_share(axes[1], steps)
    axes[0].set_title(title, loc="left", fontweight="bold")
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    with atomic_file(png_path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_loss(
    axis: "Axes", steps: Sequence[StepRecord], before: float | None, after: float | None
) -> None:
    x = [record.step for record in steps]
    loss = np.array([record.loss for record in steps])
    axis.plot(x, loss, color="#9ecae1", linewidth=1, label="training, each step")
    axis.plot(x, _smooth(loss), color="#08519c", linewidth=2, label="training, smoothed")
    measured = [(m.step, m.eval_loss) for m in steps if m.eval_loss is not None]
    if measured:
        axis.plot(*zip(*measured, strict=True), "o", color="#a63603", label="held out")
    for value, name, color in ((before, "before", "0.45"), (after, "after", "#d94801")):
        if value is not None:
            label = f"held out {name}: {value:.3f} (perplexity {_perplexity(value)})"
            axis.axhline(value, color=color, linestyle="--", linewidth=1.5, label=label)
    axis.set_ylabel("loss (nats per token)")
    axis.legend(**_LEGEND)


def _draw_share(axis: "Axes", steps: Sequence[StepRecord]) -> None:
    x = [record.step for record in steps]
    mean, low, high = (
        np.array([getattr(record, name) for record in steps], dtype=np.float64)
        for name in ("mu_mean", "mu_min", "mu_max")
    )
    axis.fill_between(
        x, low, high, color="#31a354", alpha=0.2, linewidth=0, label="lowest to highest head"
    )
    axis.plot(x, mean, color="#006d2c", linewidth=2, label="mean")
    axis.set_ylabel("memory share mu")
    axis.legend(**_LEGEND, loc="upper left")


def _smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Moving average over a tenth of the steps; values that are not finite are ignored."""
    reach = max(1, len(values) // 20)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, stop = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[first]) / (counts[stop] - counts[first])


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.1f}" if loss < 20 else "above 10^8"
