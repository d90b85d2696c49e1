"""What every task is: rows, a measurement of one row, and what the rows come to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rich.table import Table

from experiments.evaluation.store import Result
from experiments.evaluation.variants import COLUMNS, Column
from tptt_jax import CausalLM

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

Results = Mapping[str, Sequence[Result]]
"""For each column, such as "memory on", a result for every row."""


class Row(NamedTuple):
    """Something to measure a model on.

    Attributes:
      about: what decides it, as JSON.
      data: what the model gets.
    """

    about: dict[str, Any]
    data: Any


def applies(task: "Task", column: Column) -> bool:
    """Whether a task is measured in a column."""
    return column in getattr(task, "columns", COLUMNS)


def rows_at_once(task: "Task") -> int:
    """How many rows of a task are measured together."""
    return getattr(task, "rows_at_once", 1)


def measured_columns(results: Results) -> list[Column]:
    """The columns that have results, in their usual order."""
    return [name for name in COLUMNS if results.get(name)]


@dataclass(frozen=True)
class Summary:
    """What a task has found about one model."""

    table: Table
    """With units and standard errors."""
    report: dict[str, Any]
    """The same for --json."""
    sample: str = ""
    """Something that a person can read, e.g. a question and its answers."""


class Task(Protocol):
    """A way of finding out how good a model is.

    A task that applies to some columns only has an attribute `columns`. One that measures rows
    faster together has `rows_at_once`, and `measure_rows`, which takes and returns several.
    """

    @property
    def name(self) -> str:
        """As --task names it."""
        ...

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """What is measured, in order."""
        ...

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """The result of one row, as JSON."""
        ...

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """A table of all rows; columns may still lack some of them."""
        ...

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """Draws the results of all models, by label."""
        ...
