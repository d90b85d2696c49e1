"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), by name.

A task of lm-eval is a row, so a resumed evaluation repeats no finished task.
"""

import contextlib
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from experiments.evaluation.bars import plot_bars
from experiments.evaluation.blocks import Estimate
from experiments.evaluation.harness_tasks import (
    HarnessConfig,
    check_installed,
    hash_requests,
    load_tasks,
    seed_examples,
)
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, Summary, measured_columns
from tptt_jax import CausalLM

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


class Score(Estimate):
    """A score of lm-eval for a task or group, in its own unit, with its own standard error.

    Accuracies lie between 0 and 1; the error is NaN if lm-eval gives none.
    """

    def __str__(self) -> str:
        """The text for tables."""
        return f"{self.value:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Harness:
    """The lm-eval tasks of a configuration."""

    config: HarnessConfig
    name: str = "harness"

    def __post_init__(self) -> None:
        """Raises ValueError if no task is given, or lm-eval is not installed."""
        check_installed()
        if not self.config.tasks:
            raise ValueError("--task harness needs --harness.tasks NAME [NAME ...].")

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """A row for each task; groups and tags are the tasks in them."""
        del tokenizer
        config = self.config
        settings = {"max_length": config.max_length, "chat_template": config.chat_template}
        return [
            Row({"task": name, "requests": hash_requests(config, task), **settings}, task)
            for name, task in load_tasks(config).tasks.items()
        ]

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """All metrics of one task, as lm-eval names them."""
        from lm_eval.evaluator import evaluate

        from experiments.evaluation.harness_model import HarnessModel

        config, name = self.config, row.about["task"]
        wrapped = HarnessModel(
            model,
            tokenizer,
            use_memory=use_memory,
            batch_size=config.batch_size,
            max_length=config.max_length,
        )
        with _lm_eval_environment():
            seed_examples(row.data)
            found: Any = evaluate(
                wrapped,
                {"tasks": {name: row.data}, "groups": {}, "group_map": {}},
                limit=config.limit,  # pyright: ignore[reportArgumentType]
                log_samples=False,
                apply_chat_template=config.chat_template,
                fewshot_as_multiturn=True,
            )
        metrics = {key: _plain(value) for key, value in found["results"][name].items()}
        about = {"version": _plain(found["versions"][name]), "num_fewshot": found["n-shot"][name]}
        return {"metrics": metrics, "higher_is_better": found["higher_is_better"][name], **about}

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """Every metric of every task and group, with lm-eval's standard error."""
        columns = measured_columns(results)
        table = Table(title=f"{escape(label)}: lm-eval", title_justify="left")
        table.add_column("task")
        table.add_column("metric")
        for column in columns:
            table.add_column(column, justify="right")
        scores = self.scores(rows, results)
        for task, metrics in scores.items():
            for number, (metric, found) in enumerate(metrics.items()):
                cells = [str(found[column]) if column in found else "" for column in columns]
                table.add_row("" if number else escape(task), escape(metric), *cells)
        report: dict[str, Any] = {"scores": {}, "tasks": {}}
        for task, metrics in scores.items():
            report["scores"][task] = {
                metric: {column: score.report for column, score in found.items()}
                for metric, found in metrics.items()
            }
        for row, result in zip(rows, results[columns[0]], strict=False):
            about = {name: result[name] for name in ("version", "num_fewshot", "higher_is_better")}
            about["questions"] = result["metrics"].get("sample_len")
            report["tasks"][row.about["task"]] = about
        return Summary(table, report)

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """A panel for each model and metric, with a group of bars for each task."""
        panels = []
        for label, columns in results.items():
            by_metric: dict[str, dict[str, dict[str, Score]]] = {}
            for task, metrics in self.scores(rows[label], columns).items():
                for metric, found in metrics.items():
                    by_metric.setdefault(metric, {})[task] = found
            panels.append([(f"{label}\n{metric}", bars) for metric, bars in by_metric.items()])
        plot_bars(png, panels)

    def scores(
        self, rows: Sequence[Row], results: Results
    ) -> dict[str, dict[str, dict[str, Score]]]:
        """By task or group, metric and column; groups follow the tasks."""
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        groups = [
            group for group in load_tasks(self.config).groups.values() if group.has_aggregation
        ]
        for column in measured_columns(results):
            metrics = {
                row.about["task"]: result["metrics"]
                for row, result in zip(rows, results[column], strict=False)
            }
            of_groups: Any = {group.name: group.aggregate(metrics) for group in groups}
            for task, found in (metrics | of_groups).items():
                for metric, score in _scores(found).items():
                    scores.setdefault(task, {}).setdefault(metric, {})[column] = score
        return scores


def _scores(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """Scores from entries such as "acc,none" and "acc_stderr,none"; names include the filter."""
    found = {}
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = metrics.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            is_known = isinstance(error, int | float)
            found[shown] = Score(float(value), float(error) if is_known else math.nan)
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@contextlib.contextmanager
def _lm_eval_environment() -> Iterator[None]:
    """Seeds as lm-eval's own command does, and keeps its output off stdout."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    # Otherwise lm-eval forks this process for standard errors, and JAX has threads in it.
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
