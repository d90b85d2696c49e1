"""report.html of a run: one file that shows all of it, and needs no network."""

import shlex
from pathlib import Path

from rich.table import Table

from experiments.reports.environment import describe_environment
from experiments.reports.html import Section, write_report
from experiments.training.metrics import folder_metrics
from experiments.training.outcome import Outcome
from experiments.training.run import Run
from experiments.training.stage import STAGES

_PICTURES = {
    "loss.png": "Training",
    "fit.png": "The fit of the memory",
    "memory.png": "Perplexity by position",
}
_MEASURES = {
    "share": "share of the memory",
    "half_life": "half-life in tokens",
    "state_norm": "norm of the state",
    "condition": "condition of a chunk",
}


def write_run_report(run: Run, outcome: Outcome) -> None:
    """Writes report.html into the run's directory, if there is anything new.

    Args:
      run: with the samples that it has shown.
      outcome: with its pictures drawn.
    """
    config, file = run.config, run.config.output / "report.html"
    if not outcome.is_new and file.is_file():
        return
    sections = [Section("Held-out text", outcome.tables(), [], None)]
    sections += [Section(title, [], [], config.output / name) for name, title in _PICTURES.items()]
    layers = layer_table(config.output)
    if layers is not None:
        sections.append(Section("Layers", [layers], [], None))
    samples = [f"{when} training\n\n{text}" for when, text in run.samples.items()]
    if samples:
        sections.append(Section("Samples", [], samples, None))
    settings = config.output / "config.yaml"
    about = {
        "Next": outcome.next_commands(),
        "The same run again": "python -m experiments.finetune --config "
        f"{shlex.quote(str(settings))} --output ANOTHER"
        # Another run must not overwrite what this one has pushed.
        + (" --push-to-hub None" if config.hub.push_to_hub else ""),
        "Configuration": settings.read_text(encoding="utf-8") if settings.is_file() else "",
        "Environment": describe_environment(),
    }
    title = f"{config.model} on {config.data.shown}"
    write_report(file, title, [each for each in sections if _has_content(each)], about)


def layer_table(output: Path) -> Table | None:
    """The gap that attention transfer left in each layer, and what the memory does there at last.

    Args:
      output: of a run.

    Returns:
      None if nothing was measured.
    """
    gaps = next(
        (r.gap_left for r in reversed(folder_metrics(output / "transfer")) if r.gap_left), None
    )
    memory = next(
        (
            r.memory
            for name in reversed(STAGES)
            for r in reversed(folder_metrics(output / name))
            if r.memory
        ),
        None,
    )
    if memory is None:
        return None
    table = Table(title="The memory of each layer, at the last measurement")
    table.add_column("layer")
    columns = [(_MEASURES[name], memory[name]) for name in _MEASURES]
    if gaps is not None and len(gaps) == len(memory["layer"]):
        columns.insert(0, ("gap left by attention transfer", gaps))
    for name, _ in columns:
        table.add_column(name)
    for number, layer in enumerate(memory["layer"]):
        table.add_row(str(layer), *(_shown(values[number]) for _, values in columns))
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _has_content(section: Section) -> bool:
    is_drawn = section.png is not None and section.png.is_file()
    return bool(section.tables or section.samples or is_drawn)
