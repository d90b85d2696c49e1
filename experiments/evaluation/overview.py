"""The overview picture: perplexity and recall against the length of the context."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.evaluation.needles import NEEDLES, Needles
from experiments.evaluation.perplexity import LINES, Perplexity
from experiments.evaluation.shares import percents_by_length
from experiments.evaluation.task import Results, Row, Task, measured_columns
from experiments.training.pictures import (
    new_figure,
    save_figure,
    scale_perplexity,
    scale_tokens,
)


def plot_overview(
    png: Path,
    title: str,
    tasks: Sequence[Task],
    rows: Mapping[str, Sequence[Row]],
    results: Mapping[str, Results],
) -> bool:
    """Draws perplexity by position beside the share of hidden text that is found.

    Args:
      png: the picture; an earlier one is replaced.
      title: the model.
      tasks: the tasks of the run.
      rows: of each task, by its name.
      results: of each task, by its name.

    Returns:
      Whether there was anything to draw: perplexity and a retrieval task are needed.
    """
    perplexity = next((task for task in tasks if isinstance(task, Perplexity)), None)
    hidden = [task for task in tasks if isinstance(task, Needles)]
    if perplexity is None or not hidden:
        return False
    figure, (left, right) = new_figure(2, height=4)
    for name, curve in perplexity.curves(results[perplexity.name]).items():
        left.plot(*curve, label=name, **LINES[name])
    scale_tokens(left, "tokens of context")
    scale_perplexity(left)
    # Only the simplest task is drawn: lines of several would be hard to tell apart.
    chosen = min(hidden, key=lambda task: NEEDLES.index(task.name))
    found = results[chosen.name]
    for name in measured_columns(found):
        means = percents_by_length(rows[chosen.name], found[name], chosen.lengths)
        right.plot(chosen.lengths, means, label=name, **LINES[name])
    scale_tokens(right, "tokens of context")
    right.set_ylim(-3, 103)
    right.set_ylabel(f"% right: {chosen.name}")
    left.legend(fontsize=9, edgecolor="none")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    save_figure(figure, png)
    return True
