"""Runs tasks on models, column by column and row by row, and resumes after an interruption."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.evaluation.store import Result, RowStore, content_hash, row_key
from experiments.evaluation.task import Row, Task, applies, rows_at_once
from experiments.evaluation.variants import Column, Source, Variant, variants_of
from tptt_jax import CausalLM

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_PLAIN_SECONDS = 10.0

_KeyedRow = tuple[Task, Row, str]
"""A row of a task, and its key in the store."""


@dataclass
class Findings:
    """All measurements of one model."""

    label: str
    variants: list[Variant] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """Of each task."""
    results: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    """Of each task, by column."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """The tasks and settings that all models share."""

    tasks: Sequence[Task]
    store: RowStore
    console: Console
    dtype: jnp.dtype
    window: int | None
    """None: as a model was trained."""
    sinks: int | None
    columns: Sequence[Column]
    """Columns to measure, where they apply."""

    def run(self, source: Source) -> Findings:
        """Measures one model."""
        loaded = source.load(self.window, self.sinks, self.dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
        found = Findings(source.label)
        variants = variants_of(model.config, model.liza, self.dtype)
        found.variants = [each for each in variants if each.name in self.columns]
        if not found.variants:
            raise ValueError(
                f"{source.label} has none of the columns {', '.join(self.columns)}, only "
                f"{', '.join(each.name for each in variants)}: add one of these to --columns, or "
                "leave the model out."
            )
        for task in self.tasks:
            found.rows[task.name] = task.rows(tokenizer)
            found.results[task.name] = {
                variant.name: [] for variant in found.variants if applies(task, variant.name)
            }
        own = None if model.liza is None else model.liza.softmax_window
        for variant in found.variants:
            missing = [
                (task, row, key)
                for task in self.tasks
                if applies(task, variant.name)
                for row, key in self._keyed(task, found, source, variant)
                if self.store.get(key) is None
            ]
            if missing:
                loaded = model
                if variant.window != own:
                    full = variant.window is None
                    loaded = source.load(variant.window, self.sinks, self.dtype, is_full=full).model
                self._measure(f"{found.label}, {variant.name}", loaded, tokenizer, variant, missing)
            for task in self.tasks:
                if not applies(task, variant.name):
                    continue
                found.results[task.name][variant.name] = [
                    result
                    for _, key in self._keyed(task, found, source, variant)
                    if (result := self.store.get(key)) is not None
                ]
        return found

    def _keyed(
        self, task: Task, found: Findings, source: Source, variant: Variant
    ) -> Iterator[tuple[Row, str]]:
        for row in found.rows[task.name]:
            yield (
                row,
                row_key(
                    model=source.label,
                    stamp=source.stamp,
                    dtype=str(self.dtype),
                    sinks=self.sinks,
                    window=variant.window,
                    memory=variant.use_memory,
                    task=task.name,
                    row=row.about,
                    content=content_hash(row.data),
                    **source.settings,
                ),
            )

    def _measure(
        self,
        title: str,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        variant: Variant,
        rows: Sequence[_KeyedRow],
    ) -> None:
        # The column's text is parsed as markup and by str.format.
        shown_title = escape(title).replace("{", "{{").replace("}", "}}")
        bar = Progress(
            TextColumn(f"{shown_title}  {{task.completed:.0f}}/{{task.total:.0f}}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        last = time.monotonic()
        with bar:
            shown = bar.add_task("", total=len(rows))
            done = 0
            for some in _batches(rows):
                results = _measure_some(model, tokenizer, some, use_memory=variant.use_memory)
                for (_, _, key), result in zip(some, results, strict=True):
                    self.store.add(key, result)
                done += len(some)
                bar.update(shown, completed=done)
                if not self.console.is_terminal and (
                    done == len(rows) or time.monotonic() - last > _PLAIN_SECONDS
                ):
                    last = time.monotonic()
                    self.console.print(f"{title}  {done}/{len(rows)}", markup=False)


def _batches(rows: Sequence[_KeyedRow]) -> Iterator[Sequence[_KeyedRow]]:
    """Rows task by task, in groups that are measured together."""
    for task, of_task in itertools.groupby(rows, key=lambda row: row[0]):
        left = list(of_task)
        while left:
            some, left = left[: rows_at_once(task)], left[rows_at_once(task) :]
            yield some


def _measure_some(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    rows: Sequence[_KeyedRow],
    *,
    use_memory: bool,
) -> Sequence[Result]:
    task: Any = rows[0][0]
    if rows_at_once(task) > 1:
        given = [row for _, row, _ in rows]
        return task.measure_rows(model, tokenizer, given, use_memory=use_memory)
    return [task.measure(model, tokenizer, row, use_memory=use_memory) for _, row, _ in rows]
