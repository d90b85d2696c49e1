"""One data set of a stream: its examples by index, made from the row when they are asked for."""

import contextlib
import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from experiments.data.bad_rows import BadRows
from experiments.data.columns import Format, find_format, read_columns, rename_columns
from experiments.data.config import DataConfig
from experiments.data.formats import cut_document, row_examples, text_cells, text_documents
from experiments.data.indexed_rows import IndexedRows
from experiments.data.packing import Example
from experiments.data.permutation import Permutation
from experiments.data.rows import RowRun, Rows
from experiments.data.special_tokens import begin_tokens

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

# Rows whose columns are those of the data.
_SAMPLE = 100
# A share of a large data set would be more than one wants to evaluate, or to hold in memory.
_MOST_HELD_OUT = 1000


class StreamTable:
    """The rows of one data set in a random order; the first ones are held out."""

    def __init__(
        self,
        rows: IndexedRows,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerFast",
        seed: int,
    ) -> None:
        """Finds the format by the first rows.

        Args:
          rows: of the data set.
          config: what the rows mean.
          tokenizer: of the model.
          seed: chooses the held-out rows.

        Raises:
          ValueError: if columns are missing, nothing is left to train on, or the tokenizer has no
            chat template for conversations.
        """
        self._rows, self._config, self._tokenizer = rows, config, tokenizer
        self._columns = _columns(rows)
        self.format: Format = find_format(self._table([]), config.format, config.text_column)
        if self.format != "text":  # refuses conversations without a template, for all rows at once
            row_examples(tokenizer, self._table([]), self.format, config.loss)
        self._order = Permutation(len(rows), seed)
        count = int(config.eval_rows)
        if 0 < config.eval_rows < 1:
            count = min(max(1, round(len(rows) * config.eval_rows)), _MOST_HELD_OUT)
        if count >= len(rows):
            raise ValueError(
                f"{rows.shown} has {len(rows)} rows and {count} would be held out, which leaves "
                "nothing to train on: lower --data.eval-rows (0 holds out nothing)."
            )
        self._num_held_out = count
        self.prefix = begin_tokens(tokenizer) if self.format == "text" else []

    @property
    def shown(self) -> str:
        """The data's name for messages."""
        return self._rows.shown

    @property
    def num_rows(self) -> int:
        """Rows to train on."""
        return len(self._rows) - self._num_held_out

    def document(self, index: int) -> Int[np.ndarray, " L"]:
        """The tokens of a text to train on, without what a text begins with.

        Raises:
          ValueError: if the row holds no text; the message names it.
        """
        return self._document(self._order(self._num_held_out + index))

    def example(self, index: int) -> Example:
        """The example of a row to train on that has prompt and answer, cut to the row length.

        Raises:
          ValueError: if the row is invalid; the message names it.
        """
        return self._example(self._order(self._num_held_out + index))

    def held_out(self, bad: BadRows) -> list[Example]:
        """The held-out examples, those without targets left out.

        Args:
          bad: takes the rows that cannot be read.

        Raises:
          ValueError: as `BadRows.read`.
        """
        found = []
        for number in range(self._num_held_out):
            found += self._examples(number, bad)
        return [example for example in found if example.targets.any()]

    def first_examples(self, count: int, bad: BadRows) -> list[Example]:
        """The first examples to train on, those without targets left out.

        Args:
          count: most examples.
          bad: takes the rows that cannot be read.

        Raises:
          ValueError: as `BadRows.read`, and if no row can be read.
        """
        found: list[Example] = []
        for number in range(self._num_held_out, len(self._rows)):
            if len(found) >= count:
                break
            found += self._examples(number, bad)
        bad.check_any_good()
        return [example for example in found[:count] if example.targets.any()]

    def _examples(self, number: int, bad: BadRows) -> list[Example]:
        """The examples of a row of the random order: one, the pieces of a text, or none."""
        index = self._order(number)
        if self.format != "text":
            example = bad.read(functools.partial(self._example, index))
            return [] if example is None else [example]
        tokens = bad.read(functools.partial(self._document, index))
        if tokens is None:
            return []
        return cut_document(tokens, self._config.sequence_length, self.prefix)

    def _document(self, index: int) -> Int[np.ndarray, " L"]:
        rows = self._table([index])
        return text_documents(self._tokenizer, text_cells(rows, self._config.text_column))[0]

    def _example(self, index: int) -> Example:
        rows = self._table([index])
        (found,) = row_examples(self._tokenizer, rows, self.format, self._config.loss)
        length = self._config.sequence_length
        return Example(found.tokens[:length], found.targets[:length])

    def _table(self, indices: list[int]) -> Rows:
        """Some rows under our names of their columns."""
        rows = Rows(
            source=self.shown,
            columns=self._columns,
            rows=[self._rows.read(index) for index in indices],
            runs=tuple(RowRun(i, *self._rows.place(index)) for i, index in enumerate(indices)),
        )
        return rename_columns(rows, read_columns(self._config.columns))


def _columns(rows: IndexedRows) -> tuple[str, ...]:
    """The columns of the first rows that can be read."""
    names: dict[str, None] = {}
    for index in range(min(len(rows), _SAMPLE)):
        with contextlib.suppress(ValueError):  # it is named when its turn comes
            names |= dict.fromkeys(rows.read(index))
    return tuple(names)
