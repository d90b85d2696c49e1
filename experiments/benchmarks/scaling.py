"""``python -m experiments.bench scaling``: weak scaling of context parallelism, from a model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.benchmarks.context_costs import StepCost, step_cost
from experiments.benchmarks.random_models import SHAPES, Shape
from experiments.benchmarks.timing import Options, check_positive, write_result
from experiments.training.pictures import save_figure
from tptt_jax import LizaConfig

_KINDS = ("window and memory", "window alone", "full softmax")
_COLORS = ("#08519c", "#d94801", "#636363")
_WIDTHS = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ScalingWork:
    """One row whose length grows with the devices that share it."""

    random_weights: Shape = "llama3.2-1b"
    """Shape of the model."""
    tokens: int = 8192
    """Tokens of the row on each device."""
    window: int = 1024
    """Tokens that softmax attention sees."""
    devices: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 512)
    """Sizes of the context axis."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    tflops: float = 300.0
    """10^12 operations per second that matrix products reach on one device."""
    gigabytes: float = 50.0
    """10^9 bytes per second that a device receives."""
    microseconds: float = 20.0
    """Time of an exchange, whatever its size."""

    def __post_init__(self) -> None:
        """Rejects sizes below 1, and rates that are not above 0."""
        check_positive(self)
        for name in ("tflops", "gigabytes", "microseconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not self.devices or min(self.devices) < 1:
            raise ValueError(f"devices must be numbers of at least 1, got {self.devices}.")


def bench_scaling(
    work: Options[ScalingWork], output: Path = Path("runs/scaling")
) -> dict[str, Any]:
    """Models a step of LoRA training as rows grow with the devices that share them.

    Nothing is measured: operations and bytes are counted, and divided by the rates given. Writes
    scaling.json and scaling.png.

    Args:
      work: what is modelled.
      output: directory for both files.
    """
    runs = {kind: [_result(work, kind, count) for count in work.devices] for kind in _KINDS}
    for results in runs.values():
        for result in results:
            result["efficiency"] = results[0]["seconds"] / result["seconds"]
    report = {"bench": "scaling", "workload": dataclasses.asdict(work), "runs": runs}
    write_result(output / "scaling.json", report)
    _plot(output / "scaling.png", work, runs)
    return report


def _result(work: ScalingWork, kind: str, shards: int) -> dict[str, Any]:
    config, width = SHAPES[work.random_weights](), _WIDTHS[work.dtype]
    memories: dict[str, LizaConfig | None] = {
        "window and memory": LizaConfig(softmax_window=work.window),
        "window alone": LizaConfig(softmax_window=work.window, writes="none"),
        "full softmax": None,
    }
    cost = step_cost(config, memories[kind], tokens=work.tokens, shards=shards, width=width)
    return {
        "devices": shards,
        "tokens": work.tokens * shards,
        "tflops_per_device": cost.flops / 1e12,
        "megabytes_per_device": cost.exchange.bytes / 1e6,
        "megabytes_of_states": cost.exchange.state / 1e6,
        "exchanges": cost.exchange.rounds,
        "seconds": _seconds(work, cost),
    }


def _seconds(work: ScalingWork, cost: StepCost) -> float:
    return cost.seconds(
        flops=work.tflops * 1e12,
        bandwidth=work.gigabytes * 1e9,
        latency=work.microseconds * 1e-6,
    )


def _plot(path: Path, work: ScalingWork, runs: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    panels = (
        ("seconds", "seconds per step (modelled)"),
        ("tflops_per_device", "10^12 operations per device"),
        ("megabytes_per_device", "MB received per device"),
    )
    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for (kind, results), color in zip(runs.items(), _COLORS, strict=True):
            points = [(x["devices"], x[key]) for x in results if x[key]]
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=kind, alpha=0.7)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(work.devices, list(map(str, work.devices)))
        axis.set_xlabel(f"devices, each with {work.tokens:,} tokens of one row")
        axis.set_title(label, loc="left", fontsize=10)
        axis.grid(visible=True, color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{work.random_weights}, window {work.window:,}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)
