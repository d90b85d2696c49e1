"""Output of the context benchmark: context.json and context.png, with peers beside ours."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.formats.files import check_regular
from experiments.benchmarks.timing import write_result
from experiments.training.pictures import save_figure

if TYPE_CHECKING:  # matplotlib takes seconds to import
    from matplotlib.axes import Axes

Runs = dict[str, list[dict[str, Any]]]

_COLORS = ("#08519c", "#d94801", "#636363", "#31a354")


def write_context_report(output: Path, runs: Runs, about: dict[str, Any]) -> dict[str, Any]:
    """Writes context.json and context.png into a directory; returns the content of context.json.

    Args:
      output: the directory.
      runs: results of `measure_contexts` so far, by program.
      about: further entries of context.json; "model" is the title.
    """
    written = about | {"runs": runs}
    write_result(output / "context.json", written)
    _plot(output / "context.png", runs, str(about["model"]))
    return written


def describe(result: dict[str, Any]) -> str:
    """One measured context as a line of text."""
    prefill, decoding = result["prefill_s_per_token"], result["decode_s_per_token"]
    parts = [
        f"{result['context']} tokens",
        f"decoding {decoding * 1e3:.2f} ms a token",
        "not read" if prefill is None else f"prefill {prefill * 1e3:.2f} ms a token",
        f"state {result['state_bytes'] / 1e6:.1f} MB",
        f"memory {result['resident_gb']:.2f} GB, at most {result['peak_gb']:.2f} GB",
    ]
    return ", ".join(parts)


def read_peer(path: Path) -> Runs:
    """Reads the measurements of another program, in the form of "runs" in context.json.

    Raises:
      ValueError: if the file has another form.
    """
    check_regular(path)
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for name, results in runs.items():
            for result in results:
                if not {"context", "decode_s_per_token"} <= result.keys():
                    raise ValueError(f"{name} lacks context or decode_s_per_token")
        return runs
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"runs": {name: [{"context": ..., "decode_s_per_token": ...}, ...]}}'
        raise ValueError(f"{path} must hold {form}, as context.json does: {error}.") from None


def _plot(path: Path, runs: Runs, model: str) -> None:
    from matplotlib.figure import Figure

    panels = (
        ("decode_s_per_token", "decoding, ms per token", 1e3),
        ("prefill_s_per_token", "prefill, ms per token", 1e3),
        ("state_bytes", "state, MB", 1e-6),
    )
    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
    for axis, (key, label, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for (name, results), color in zip(runs.items(), _COLORS * len(runs), strict=False):
            _draw(axis, results, key, scale, name, color)
        axis.set_xscale("log", base=2)
        lengths = sorted({result["context"] for results in runs.values() for result in results})
        axis.set_xticks(lengths, [_short(length) for length in lengths])
        # From zero: a flat line should look flat.
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_xlabel("context, tokens")
        axis.set_title(label, loc="left", fontsize=10)
        axis.grid(visible=True, color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(model, x=0.01, ha="left", fontweight="bold")
    if runs:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _draw(
    axis: "Axes", results: list[dict[str, Any]], key: str, scale: float, name: str, color: str
) -> None:
    points = [(r["context"], r[key] * scale) for r in results if r.get(key) is not None]
    if points:
        # Transparent, as lines of two programs may coincide.
        axis.plot(*zip(*points, strict=True), "o-", color=color, label=name, alpha=0.7)


def _short(length: int) -> str:
    """1024 as 1k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
