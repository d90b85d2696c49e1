"""``python -m experiments.evaluate``: measures models, and the contribution of their memory."""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro
import yaml
from rich.console import Console

from convert.command_line import plain_json
from convert.model_card import local_paths, name_paths
from experiments.command_line import run_configured
from experiments.data import DataConfig
from experiments.evaluation.ablation import Ablation
from experiments.evaluation.associative import AssociativeRecall
from experiments.evaluation.harness import Harness
from experiments.evaluation.harness_tasks import HarnessConfig
from experiments.evaluation.mmlu import Mmlu
from experiments.evaluation.mmlu_data import MmluConfig
from experiments.evaluation.needles import NEEDLES, Needles
from experiments.evaluation.overview import plot_overview
from experiments.evaluation.perplexity import Perplexity
from experiments.evaluation.runner import Findings, Runner
from experiments.evaluation.seen_text import note_seen_text
from experiments.evaluation.store import RowStore
from experiments.evaluation.task import Summary, Task
from experiments.evaluation.variants import COLUMNS, MEMORY, Column, Source
from experiments.models import apply_revision
from experiments.process.compilation_cache import prepare_process
from experiments.process.memory_use import peak_gb
from experiments.process.output_folder import locked_output
from experiments.reports.environment import describe_environment
from experiments.reports.html import Section, write_report
from experiments.reports.tables import table_texts
from tptt_jax.durable import atomic_file
from tptt_jax.ops.quantization import BaseDtype

TaskName = Literal[
    "perplexity",
    "passkey",
    "needle",
    "needle-single",
    "needle-multikey",
    "needle-multivalue",
    "variable-tracking",
    "recall",
    "ablate",
    "mmlu",
    "harness",
]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures models, each in up to four ways side by side.

    The ways are full softmax attention, the window alone, a wider window with as many bytes as
    window and memory together, and the memory on.
    """

    models: tuple[str, ...] = ()
    """Models to measure: runs of experiments.finetune, exported directories, and anything that
    --model takes. None: those of --model and --adapter."""
    model: str | None = None
    """"smollm2-135m" or "gemma3-270m", which come as packages; a Hugging Face directory, a Hub id,
    a .gguf file, a PEFT directory, or a run of experiments.finetune. None: what the adapter was
    trained on, or smollm2-135m."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; the same as hub-id@revision."""
    adapter: Path | None = None
    """Output directory of a finetune run, for its adapters and its memory; or a PEFT directory."""
    task: tuple[TaskName, ...] = ("perplexity",)
    """"perplexity": by position, of a text or of a table's held-out rows. "passkey": finding a
    number hidden in a text. "needle": the four tasks after it, which hide sentences: one, one of
    several, several for one key, a chain of assignments. "recall": pairs, then their keys again.
    "ablate": perplexity of a text with one part of a Titan at a time switched off. "mmlu": its
    questions with one example each. "harness": any tasks of lm-eval."""
    mmlu: MmluConfig = field(default_factory=MmluConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokens: int = 65536
    """Most tokens of the data to score, for perplexity and ablate. Of a text that finetune trained
    on, only the first --data.eval-tokens are held out."""
    row_tokens: int | None = None
    """Perplexity reads a text as rows of so many tokens, each from its own beginning, so that a
    position is measured at many places of the text. None: as one long row."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Lengths in tokens of the prompts of passkey and needle, and of the rows of recall."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places of the hidden text, from 0, the beginning, to 1, right before the question."""
    samples: int = 4
    """Prompts for each length and depth."""
    columns: tuple[Column, ...] = ()
    """Which ways to measure; none: all that apply."""
    window: int | None = None
    """Tokens that softmax attention sees, beside the first few. None: as the model was trained."""
    sinks: int | None = None
    """First tokens that always stay visible. None: what the model was trained with, or 4."""
    context: int | None = None
    """Fixes rotary frequencies that depend on the length of the text ("dynamic" and "longrope"
    scaling) for this many tokens, the longest text that is read. Others stay as they are."""
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leaves the memory out; a window stays."""
    output: Path = Path("runs/evaluate")
    """Directory for results.json, report.html, a picture for each task, and rows.jsonl, from which
    an interrupted evaluation resumes."""
    seed: int = 0
    """Seed of the hidden texts and their places, and of the held-out rows of a table: finetune's,
    if it trained on the same table."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and activations."""
    base_dtype: BaseDtype | None = None
    """Quantises the base model's matrices, as finetune does; None: they have --dtype, also under
    adapters that were trained on quantised ones."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        if self.models and (self.model is not None or self.adapter is not None):
            raise ValueError("--models names all models: leave --model and --adapter out.")
        apply_revision(self)
        if self.context is not None and self.context < 0:
            raise ValueError(f"context must be at least 0, got {self.context}.")
        if not self.task:
            raise ValueError("task must name at least one task, got none.")
        for name, least, values in (
            ("tokens", 2, (self.tokens,)),
            ("samples", 1, (self.samples,)),
            ("lengths", 2, self.lengths),
            ("row_tokens", 2, (2 if self.row_tokens is None else self.row_tokens,)),
            ("sinks", 0, (0 if self.sinks is None else self.sinks,)),
        ):
            if not values or min(values) < least:
                shown = ", ".join(map(str, values)) or "none"
                raise ValueError(f"{name} must be at least {least}, got {shown}.")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must lie between 0 and 1, got {self.depths}.")
        for name in ("models", "lengths", "depths"):
            values = getattr(self, name)
            twice = [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} names {', '.join(twice)} twice: name each once.")
        if not self.measured_columns:
            raise ValueError(
                f'--no-liza leaves out the column "{MEMORY}", and --columns names no other: name '
                "one, or leave --no-liza out."
            )

    @property
    def measured_columns(self) -> tuple[Column, ...]:
        """The columns to measure, where they apply."""
        columns = self.columns or COLUMNS
        return tuple(name for name in columns if not (self.no_liza and name == MEMORY))

    @property
    def sources(self) -> list[Source]:
        """The models, in order."""
        if self.models:
            return [Source.named(name, self.context, self.base_dtype) for name in self.models]
        return [Source(self.model, self.adapter, self.context, self.base_dtype)]

    @property
    def tasks(self) -> list[Task]:
        """The tasks, each once."""
        names: list[str] = []
        for name in self.task:
            names += [n for n in NEEDLES if n != "passkey"] if name == "needle" else [name]
        return [self._task(name) for name in dict.fromkeys(names)]

    def _task(self, name: str) -> Task:
        if name == "perplexity":
            return Perplexity(self.data, self.tokens, self.seed, self.row_tokens)
        if name == "recall":
            return AssociativeRecall(self.lengths, self.samples, self.seed)
        if name == "ablate":
            return Ablation(self.data, self.tokens)
        if name == "mmlu":
            return Mmlu(self.mmlu)
        if name == "harness":
            return Harness(self.harness)
        return Needles(name, self.data, self.lengths, self.depths, self.samples, self.seed)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures, prints and writes the reports; returns what --json prints."""
    prepare_process()
    with locked_output(config.output):
        return _evaluate(config) | {"peak_gb": peak_gb()}


def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    console = Console(soft_wrap=True, highlight=False)
    tasks = config.tasks
    runner = Runner(
        tasks=tasks,
        store=RowStore(config.output / "rows.jsonl"),
        console=console,
        dtype=jnp.dtype(config.dtype),
        window=config.window,
        sinks=config.sinks,
        columns=config.measured_columns,
    )
    _print_seen_text(config, console)
    findings = [runner.run(source) for source in config.sources]
    summaries = {task.name: [_summary(task, found) for found in findings] for task in tasks}
    for each in summaries.values():
        for summary in each:
            console.print(summary.table)
            if summary.sample:
                console.print(summary.sample + "\n", markup=False)
    result = _result(config, findings, summaries)
    _write(config, tasks, findings, summaries, result)
    console.print(f"report, pictures and results are in {config.output}", markup=False)
    return result


def _print_seen_text(config: EvaluateConfig, console: Console) -> None:
    """Names the runs that were trained on what their perplexity is measured on."""
    if not {"perplexity", "ablate"} & set(config.task):
        return
    for source in config.sources:
        if source.run is not None:
            note = note_seen_text(source.run, config.data, config.tokens, config.seed)
            if note is not None:
                console.print(note, markup=False)


def _summary(task: Task, found: Findings) -> Summary:
    return task.summarize(found.label, found.rows[task.name], found.results[task.name])


def _result(
    config: EvaluateConfig, findings: list[Findings], summaries: dict[str, list[Summary]]
) -> dict[str, Any]:
    models = {
        found.label: {
            "windows": {variant.name: variant.window for variant in found.variants},
            "tasks": {name: each[i].report for name, each in summaries.items()},
        }
        for i, found in enumerate(findings)
    }
    return {"output": str(config.output), "models": models}


def _with_tables(
    result: dict[str, Any], summaries: dict[str, list[Summary]], settings: dict[str, Any]
) -> dict[str, Any]:
    """The result with the tables that model cards show, which name files without their folders."""
    models = {}
    for i, (label, model) in enumerate(result["models"].items()):
        tables = {name: [table_texts(each[i].table)] for name, each in summaries.items()}
        known = local_paths([settings, label])
        models[label] = model | {"tables": name_paths(tables, known)}
    return result | {"models": models}


def _write(
    config: EvaluateConfig,
    tasks: list[Task],
    findings: list[Findings],
    summaries: dict[str, list[Summary]],
    result: dict[str, Any],
) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "experiments.evaluate", *sys.argv[1:]])
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    with atomic_file(config.output / "results.json") as path:
        content = _with_tables(result, summaries, settings) | {"command": command}
        text = json.dumps(plain_json(content), indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    sections = []
    for number, found in enumerate(findings):
        # Every model's own; the first one's has the plain name.
        png = config.output / ("overview.png" if number == 0 else f"overview-{number + 1}.png")
        if plot_overview(png, found.label, tasks, found.rows, found.results):
            sections.append(Section(f"overview: {found.label}", [], [], png))
    for task in tasks:
        png = config.output / f"{task.name}.png"
        task.plot(
            png,
            {found.label: found.rows[task.name] for found in findings},
            {found.label: found.results[task.name] for found in findings},
        )
        each = summaries[task.name]
        sections.append(Section(task.name, [s.table for s in each], [s.sample for s in each], png))
    about = {
        "Command": command,
        "Configuration": yaml.safe_dump(settings, sort_keys=False),
        "Environment": describe_environment(),
    }
    title = "Evaluation of " + ", ".join(found.label for found in findings)
    write_report(config.output / "report.html", title, sections, about)


def main() -> None:
    """The command."""
    sys.exit(run_configured(evaluate, EvaluateConfig, prog="python -m experiments.evaluate"))


if __name__ == "__main__":
    main()
