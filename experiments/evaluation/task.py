"""The protocol of tasks: rows, a measurement of one row, and a summary of all."""

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
    """One item to measure a model on.

    Attributes:
      about: its properties, as JSON.
      data: the input of the model.
    """

    about: dict[str, Any]
    data: Any


def applies(task: "Task", column: Column) -> bool:
    """Whether a task is measured in a column."""
    return column in getattr(task, "columns", COLUMNS)


def rows_at_once(task: "Task") -> int:
    """Number of rows that a task measures together."""
    return getattr(task, "rows_at_once", 1)


def measured_columns(results: Results) -> list[Column]:
    """The columns that have results, in their usual order."""
    return [name for name in COLUMNS if results.get(name)]


@dataclass(frozen=True)
class Summary:
    """The results of a task for one model."""

    table: Table
    """With units and standard errors."""
    report: dict[str, Any]
    """The same for --json."""
    sample: str = ""
    """A readable example, e.g. a question and its answers."""


class Task(Protocol):
    """An evaluation of a model.

    A task that applies to some columns only has an attribute `columns`. A task that measures rows
    in batches has `rows_at_once`, and `measure_rows`, which takes and returns several.
    """

    @property
    def name(self) -> str:
        """The name for --task."""
        ...

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """The rows to measure, in order."""
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
        """A table of all rows; columns may lack results of some."""
        ...

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """Draws the results of all models, by label."""
        ...
