"""Packs examples of any length into rows of one length, and rows into batches."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Example(NamedTuple):
    """One document, prompt with answer, or conversation."""

    tokens: Int[np.ndarray, " L"]
    targets: Bool[np.ndarray, " L"] | Float[np.ndarray, " L"]
    """True where the token counts in the loss, or its weight; never the first one, which has no
    prediction."""


class TokenBatch(NamedTuple):
    """The input of one training or evaluation step."""

    tokens: Int[np.ndarray, "B T"]
    """int32."""
    segment_ids: Int[np.ndarray, "B T"]
    """int32; 1, 2, ... for the examples of a row, 0 for padding."""
    loss_mask: Bool[np.ndarray, "B T"] | Float[np.ndarray, "B T"]
    """True where the token at this place is a target, predicted from the place before it; or how
    much it counts."""


@dataclass(frozen=True, kw_only=True)
class TokenBatchSource:
    """Rows of tokens, and the order in which training sees them."""

    tokens: Int[np.ndarray, "n T"]
    """int32."""
    segment_ids: Int[np.ndarray, "n T"]
    """int32; 1, 2, ... for the examples of a row, 0 for padding."""
    loss_mask: Bool[np.ndarray, "n T"] | Float[np.ndarray, "n T"]
    """True where the token at this place is a target, predicted from the place before it; or how
    much it counts."""

    @property
    def num_rows(self) -> int:
        """Rows, each of `sequence_length` places."""
        return self.tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        """Places of a row, padding included."""
        return self.tokens.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows without padding."""
        return int(np.count_nonzero(self.segment_ids))

    @property
    def num_targets(self) -> int:
        """Tokens of all rows that count in the loss."""
        return int(np.count_nonzero(self.loss_mask))

    def joined(self, other: "TokenBatchSource") -> "TokenBatchSource":
        """These rows and then others of the same length."""
        return TokenBatchSource(
            tokens=np.concatenate([self.tokens, other.tokens]),
            segment_ids=np.concatenate([self.segment_ids, other.segment_ids]),
            loss_mask=np.concatenate([self.loss_mask, other.loss_mask]),
        )

    def batch_at(
        self, step: int, batch_size: int, seed: int, part: slice = slice(None)
    ) -> TokenBatch:
        """The batch of one training step, a pure function of its arguments.

        Rows run through one random order per epoch; a batch that reaches an epoch's end goes
        on with the next epoch's order, so that nothing is dropped and a resumed run needs
        nothing but its step number.

        Args:
          step: number of the step, from 0.
          batch_size: rows per step; may exceed `num_rows`.
          seed: chooses the orders.
          part: the rows of the batch to read.

        Returns:
          Arrays [batch_size, T], or their part.
        """
        return self._rows(self.rows_at(step, batch_size, seed)[part])

    def rows_at(self, step: int, batch_size: int, seed: int) -> Int[np.ndarray, " B"]:
        """The numbers of the rows that `batch_at` takes."""
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, within = np.divmod(places, self.num_rows)
        chosen = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([seed, int(epoch)]).permutation(self.num_rows)
            here = epochs == epoch
            chosen[here] = order[within[here]]
        return chosen

    def batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """All rows in order, once; the last batch is filled up with rows of padding."""
        for start in range(0, self.num_rows, batch_size):
            batch = self._rows(np.arange(start, min(start + batch_size, self.num_rows)))
            missing = batch_size - len(batch.tokens)
            padding = ((0, missing), (0, 0))
            yield TokenBatch(*(np.pad(array, padding) for array in batch))

    def _rows(self, indices: Int[np.ndarray, " B"]) -> TokenBatch:
        return TokenBatch(self.tokens[indices], self.segment_ids[indices], self.loss_mask[indices])


def pack_examples(
    examples: Sequence[Example], sequence_length: int, *, packing: bool = True
) -> TokenBatchSource:
    """Packs examples into rows of `sequence_length` places.

    Args:
      examples: each at most `sequence_length` long.
      sequence_length: places per row.
      packing: share rows between examples (best fit, longest first); False: one row each.

    Returns:
      The rows; every example is whole in exactly one of them. Padding has token 0 and segment 0.
    """
    lengths = [len(example.tokens) for example in examples]
    rows = _best_fit(lengths, sequence_length) if packing else [[i] for i in range(len(lengths))]
    return lay_out([[examples[i] for i in row] for row in rows], sequence_length)


def lay_out(rows: Sequence[Sequence[Example]], sequence_length: int) -> TokenBatchSource:
    """Builds rows from the examples of each.

    Args:
      rows: the examples of each, in their order, together at most `sequence_length` long.
      sequence_length: places per row.

    Returns:
      The rows; padding has token 0 and segment 0.
    """
    shape = (len(rows), sequence_length)
    tokens = np.zeros(shape, dtype=np.int32)
    segment_ids = np.zeros(shape, dtype=np.int32)
    kinds = (example.targets.dtype for row in rows for example in row)
    loss_mask = np.zeros(shape, np.result_type(np.bool_, *kinds))
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            place = slice(start, start + len(example.tokens))
            tokens[row, place] = example.tokens
            segment_ids[row, place] = segment
            loss_mask[row, place] = example.targets
            start = place.stop
    return TokenBatchSource(tokens=tokens, segment_ids=segment_ids, loss_mask=loss_mask)


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices; each example, longest first, goes into the fullest row with room for it."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free places, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(open_rows, (lengths[index], -1))
        if found < len(open_rows):
            free, row = open_rows.pop(found)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > lengths[index]:
            insort(open_rows, (free - lengths[index], row))
    return sorted(rows)
