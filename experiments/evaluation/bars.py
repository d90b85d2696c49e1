"""Bar charts of metrics, with a colour for each way of running a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.evaluation.perplexity import LINES
from experiments.evaluation.variants import COLUMNS
from experiments.training.pictures import save_figure

Bars = Mapping[str, Mapping[str, tuple[float, float]]]
"""By label of a bar and column: a value and its standard error, which may be NaN."""


def plot_bars(png: Path, panels: Sequence[Sequence[tuple[str, Bars]]], unit: str = "") -> None:
    """Draws panels of horizontal bars with their errors.

    Args:
      png: the picture; an earlier one is replaced.
      panels: rows of panels, each a title and its bars.
      unit: of the values.
    """
    from matplotlib.figure import Figure

    width = max(map(len, panels))
    heights = [max((len(bars) for _, bars in line), default=1) for line in panels]
    figure = Figure(
        figsize=(4.5 * width, sum(0.7 * height + 1 for height in heights)),
        dpi=150,
        layout="constrained",
    )
    axes = figure.subplots(len(panels), width, squeeze=False, height_ratios=heights)
    for line, panel in zip(axes, panels, strict=True):
        for axis, (title, bars) in zip(line, panel, strict=False):
            columns = [name for name in COLUMNS if any(name in each for each in bars.values())]
            size = 0.8 / max(len(columns), 1)
            for number, name in enumerate(columns):
                known = {i: each[name] for i, each in enumerate(bars.values()) if name in each}
                axis.barh(
                    [place + number * size for place in known],
                    [value for value, _ in known.values()],
                    height=size,
                    xerr=[error for _, error in known.values()],
                    color=LINES[name]["color"],
                    ecolor="0.55",
                    label=name,
                )
            axis.set_yticks([i + size * (len(columns) - 1) / 2 for i in range(len(bars))], [*bars])
            axis.invert_yaxis()
            axis.set_xlabel(unit)
            axis.set_title(title, loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=8, edgecolor="none")
        for axis in line[len(panel) :]:
            axis.set_visible(False)
    save_figure(figure, png)
