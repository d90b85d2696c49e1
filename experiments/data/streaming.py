"""Rows of tokens made from data sets of any size while training, in constant memory.

Each row of a step's batch is a lane: lane b of B draws the documents b, B + b, 2 B + b, ... of a
random order over the whole data set, and packs them into its rows one after the other. Rows thus
depend neither on the number of processes nor on what other lanes draw, and the numbers of documents
drawn are all there is to save.
"""

import functools
import logging
from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.marked_text import all_targets
from experiments.data.packing import Example, TokenBatch, lay_out
from experiments.data.permutation import Permutation, spread
from experiments.data.stream_table import StreamTable
from experiments.data.templates import FatalTemplateError

_LOG = logging.getLogger("tptt_jax.data")
# A shorter rest of a row is left empty rather than filled with a piece of a text.
_SHORTEST_PIECE = 8
_MOST_SKIPPED = 1000
# Steps whose positions are known: those prepared ahead, and the one that was trained on.
_REMEMBERED = 8


class _Drawn(NamedTuple):
    """What a lane has drawn of a data set."""

    documents: int
    tokens: int
    """Tokens of the next document that are in rows already."""


class StreamSource:
    """Makes the rows of one step after the other, from one data set or several."""

    num_rows = 0
    """Unknown: only steps end the training."""

    def __init__(
        self,
        tables: list[StreamTable],
        weights: tuple[float, ...],
        *,
        rows_per_step: int,
        sequence_length: int,
        packing: bool,
        seed: int,
        strict: bool = False,
    ) -> None:
        """Starts before the first step.

        Args:
          tables: the data sets.
          weights: their shares of the rows, of any sum.
          rows_per_step: rows of a batch over all processes; the lanes.
          sequence_length: tokens per row.
          packing: documents share rows.
          seed: of the order of the documents.
          strict: a row that cannot be read is an error; otherwise it is left out and named.
        """
        self._tables = tables
        self._bounds = np.cumsum(weights) / np.sum(weights)
        self._lanes, self._length, self._packing = rows_per_step, sequence_length, packing
        self._seed, self._strict = seed, strict
        self._step = 0
        self._at = np.zeros((len(tables), rows_per_step, 2), np.int64)
        self._recent = deque([(0, self._at.copy())], _REMEMBERED)
        self._open: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    @property
    def step(self) -> int:
        """The number of the next step."""
        return self._step

    @property
    def sequence_length(self) -> int:
        """Places of a row, padding included."""
        return self._length

    def position_after(self, step: int) -> Int[np.ndarray, "D B 2"]:
        """Positions of this process's lanes after `step` steps, which must be recent.

        Returns:
          For every data set and lane the documents drawn, and the tokens of the next one that are
          in rows already.
        """
        return dict(self._recent)[step]

    def seek(self, step: int, position: Int[np.ndarray, "D B 2"]) -> None:
        """Continues after `step` steps.

        Raises:
          ValueError: if the position is that of other data sets or another batch size.
        """
        if position.shape != self._at.shape:
            raise ValueError(
                f"the position in the data is that of {position.shape[0]} data sets and batches of "
                f"{position.shape[1]} rows, now there are {self._at.shape[0]} and "
                f"{self._at.shape[1]}: with --data.streaming these cannot change within a run."
            )
        self._step, self._at = step, position.copy()
        self._recent.append((step, position.copy()))
        self._open.clear()

    def batch_at(
        self, step: int, batch_size: int, seed: int, part: slice = slice(None)
    ) -> TokenBatch:
        """The batch of the next step.

        Args:
          step: its number, from 0.
          batch_size: the rows per step.
          seed: of the order.
          part: the lanes to read; always the same ones.

        Returns:
          Arrays [rows of the part, T].

        Raises:
          ValueError: if too many documents in succession cannot be used.
        """
        assert (step, batch_size, seed) == (self._step, self._lanes, self._seed), (
            "one after another"
        )
        rows = [
            self._row(self._table_of(step * self._lanes + lane), lane)
            for lane in range(self._lanes)[part]
        ]
        laid = lay_out(rows, self._length)
        self._step += 1
        self._recent.append((self._step, self._at.copy()))
        return TokenBatch(laid.tokens, laid.segment_ids, laid.loss_mask)

    def rows_at(self, step: int, batch_size: int, seed: int) -> Int[np.ndarray, " B"]:
        """The numbers of the rows of a step, counted from the first step on."""
        return np.arange(step * batch_size, (step + 1) * batch_size)

    def _table_of(self, row: int) -> int:
        """The data set of a row; any stretch of rows has them in proportion to the weights."""
        share = spread(row, self._seed)
        return min(int(np.searchsorted(self._bounds, share, "right")), len(self._tables) - 1)

    def _row(self, table: int, lane: int) -> list[Example]:
        examples: list[Example] = []
        room, skipped, reason = self._length, 0, None
        while not examples or (self._packing and room >= _SHORTEST_PIECE):
            drawn = _Drawn(*map(int, self._at[table, lane]))
            try:
                example, after = self._next(table, lane, drawn, room)
            except FatalTemplateError:
                raise
            except ValueError as error:
                if self._strict:
                    raise
                _LOG.warning("left out: %s", error)
                reason = reason or str(error)
                example, after = None, _Drawn(drawn.documents + 1, 0)
            if example is not None and len(example.tokens) > room:
                break  # the next row begins with it
            self._at[table, lane] = after
            if example is not None and example.targets.any():
                examples.append(example)
                room, skipped, reason = room - len(example.tokens), 0, None
                continue
            skipped += 1
            if skipped > _MOST_SKIPPED:
                raise ValueError(self._too_many_skipped(table, reason))
        return examples

    def _too_many_skipped(self, table: int, reason: str | None) -> str:
        """The message for too many rows without use; `reason`: why the first bad one is bad."""
        shown = f"{_MOST_SKIPPED:,} rows of {self._tables[table].shown} in succession"
        if reason is not None:
            return f"{shown} cannot be used; the first that cannot be read: {reason}"
        return (
            f"{shown} have nothing that counts in the loss: repair the rows, raise "
            "--data.sequence-length, or use --data.loss all."
        )

    def _next(self, table: int, lane: int, drawn: _Drawn, room: int) -> tuple[Example, _Drawn]:
        """The next example of a lane, and where it stands after it."""
        source = self._tables[table]
        epoch, place = divmod(drawn.documents * self._lanes + lane, source.num_rows)
        # With several data sets each has orders of its own.
        index = _order(source.num_rows, self._seed, table, epoch)(place)
        following = _Drawn(drawn.documents + 1, 0)
        if source.format != "text":
            return source.example(index), following
        number, tokens = self._open.get((table, lane), (-1, None))
        if number != drawn.documents or tokens is None:
            tokens = source.document(index)
            self._open[table, lane] = (drawn.documents, tokens)
        end = drawn.tokens + room - len(source.prefix)
        piece = tokens[drawn.tokens : end]
        begin = np.asarray(source.prefix, np.int32)
        is_whole = end >= len(tokens)
        return (
            all_targets(np.concatenate([begin, piece])),
            following if is_whole else _Drawn(drawn.documents, end),
        )


@functools.lru_cache(maxsize=64)
def _order(count: int, seed: int, table: int, epoch: int) -> Permutation:
    return Permutation(count, seed, table + 1, epoch)
