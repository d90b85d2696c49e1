"""summary.json of a finished run: what a model card says of it, and that the run has finished."""

import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from convert.model_card import SUMMARY, SUMMARY_FORMAT, RunSummary
from experiments.command_line import resolved_yaml
from experiments.data.data_files import FoundData
from experiments.reports.environment import describe_environment
from experiments.reports.tables import table_texts
from experiments.training.metrics import folder_metrics
from experiments.training.outcome import Outcome
from experiments.training.run import Run
from tptt_jax.durable import atomic_file
from tptt_jax.training.train_step import TrainState

_COMMAND = "python -m experiments.finetune --config config.yaml"


def write_summary(run: Run, outcome: Outcome, state: TrainState) -> None:
    """Writes summary.json into the run's directory, if there is anything new.

    Args:
      run: of which all stages are done.
      outcome: with everything measured.
      state: the last one.
    """
    file = run.config.output / SUMMARY
    if not outcome.is_new and file.is_file():
        return
    summary = RunSummary(
        step=int(state.step),
        command=_command(run),
        recipe=dict(_recipe(run, int(state.step))),
        settings=yaml.safe_load(resolved_yaml(run.config)),
        datasets=_hub_ids(run.resumption.files),
        measured=[table_texts(table) for table in outcome.tables()],
        worth=outcome.headline(),
    )
    with atomic_file(file) as path:
        values = {"format": SUMMARY_FORMAT} | vars(summary)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _command(run: Run) -> str:
    return f"{_COMMAND} --output {shlex.quote(run.config.output.name)}"


def _recipe(run: Run, step: int) -> Iterator[tuple[str, str | list[str]]]:
    config = run.config
    yield "base model", config.model
    path = config.data.path
    yield "data", [path] if isinstance(path, str) else list(path)
    yield "trained", _trained(run)
    yield "steps", f"{step:,}"
    if step:
        rows = f"{config.rows_per_step} x {config.data.sequence_length} tokens"
        if asked := config.asked_rows_per_step:
            rows += f", and {asked} x {config.data.recall_row_length} for the memory alone"
        yield "batch", rows
        tokens = _tokens_read(run)
        if tokens:
            yield "tokens read in training", f"{tokens:,}"
        chosen = config.optimizer
        warmup = chosen.warmup_steps if chosen.warmup_ratio is None else chosen.warmup_ratio
        unit = "steps" if chosen.warmup_ratio is None else "of all steps"
        rate = f"{chosen.learning_rate:g}, {chosen.lr_schedule}, warm-up over {warmup} {unit}"
        yield "learning rate", rate
    if config.distill:
        yield "weight of the base model's predictions in the loss", f"{config.distill:g}"
    yield from _memory(run)
    yield "precision", f"base weights in {config.dtype}, trained ones in float32"
    yield "seed", str(config.seed)
    yield "environment", describe_environment()


def _trained(run: Run) -> str:
    config, lora = run.config, run.model.lora
    if config.adapters is None or lora is None:
        return f"--train {config.train}"
    scaled = ", rslora" if lora.use_rslora else ""
    targets = ", ".join(lora.targets)
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{scaled}, on {targets}"


def _memory(run: Run) -> Iterator[tuple[str, str]]:
    liza, config = run.model.liza, run.config
    if liza is None:
        yield "memory", "none"
        return
    yield "window of softmax attention", str(liza.softmax_window or "none: all tokens")
    if not run.has_memory:
        yield "memory", "none"
        return
    yield "memory", f"{liza.operator}, writes {liza.writes} tokens"
    transfer, distill = (
        len(folder_metrics(run.config.output / folder)) for folder in ("transfer", "distill")
    )
    if transfer or distill:
        fit = f"{transfer} steps of attention transfer, {distill} of distillation"
        yield "fit of the memory", fit
    if config.data.recall:
        yield "rows that ask for what the window lost", f"{config.data.recall:.0%}"


def _tokens_read(run: Run) -> int:
    records = folder_metrics(run.config.output)
    tokens = [record.tokens_per_s * record.seconds for record in records]
    return round(sum(each for each in tokens if math.isfinite(each)))


def _hub_ids(found: FoundData) -> list[str]:
    parts: Any = found.parts or (found,)
    return [path for part in parts if part.is_hub for path in part.paths if "/" in path]
