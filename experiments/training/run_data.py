"""The rows of a run: in memory or streamed, checked against the model, batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.data import (
    StreamData,
    StreamSource,
    TokenBatch,
    TokenBatchSource,
    TokenData,
)
from experiments.models.limits import check_lengths, check_tokens
from experiments.training.placement import Placement
from experiments.training.positions import read_position, save_position
from experiments.training.windows import WindowRange
from tptt_jax import ModelConfig
from tptt_jax.array_typing import Array
from tptt_jax.training.train_step import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# More would hide what follows.
_NAMED_BAD_ROWS = 10


def print_bad_rows(bad_rows: Sequence[str], console: Console) -> None:
    """Names the first rows that were left out because they cannot be read."""
    for line in bad_rows[:_NAMED_BAD_ROWS]:
        console.print(f"left out: {line}", markup=False)


def check_rows(
    data: TokenData | StreamData, model: ModelConfig, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Raises ValueError for tokens or rows that a model cannot read; streams are checked later."""
    if isinstance(data.train, TokenBatchSource):
        check_tokens(data.train.tokens, model.vocab_size, tokenizer)
        check_lengths(data.train.segment_ids, model, "--data.sequence-length")
    if isinstance(data, TokenData) and data.asked is not None:
        check_tokens(data.asked.tokens, model.vocab_size, tokenizer)
    if data.eval is not None:
        check_tokens(data.eval.tokens, model.vocab_size, tokenizer)
        check_lengths(data.eval.segment_ids, model, "--data.eval-length")


@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """The batches of training, on their way to the devices."""

    source: TokenBatchSource | StreamSource
    asked: TokenBatchSource | None
    """Rows that train the memory alone; None: a step takes none."""
    placement: Placement
    asked_placement: Placement
    model: ModelConfig
    tokenizer: "PreTrainedTokenizerFast"
    windows: WindowRange | None
    """None: the model's own window in every step."""
    seed: int
    output: Path
    """Where positions in streamed data are."""

    def batch_at(self, step: int) -> tuple[tuple[Batch, Array | None, Batch | None], int]:
        """The batch of a step, its window, its rows for the memory alone, and its tokens.

        Of several processes each reads its own rows, and counts its part of the tokens.
        """
        size, source = self.placement.rows_per_step, self.source
        if isinstance(source, StreamSource) and source.step != step:
            source.go_to(step, read_position(self.output, step))
        batch = source.batch_at(step, size, self.seed, self.placement.own_rows)
        if isinstance(source, StreamSource):
            check_tokens(batch.tokens, self.model.vocab_size, self.tokenizer)
            check_lengths(batch.segment_ids, self.model, "--data.sequence-length")
        window = None
        if self.windows is not None:
            window = jnp.asarray(self.windows.draw(self.seed, "train", step))
        tokens, asked = _own_tokens(batch, size), None
        if self.asked is not None:
            size, own = self.asked_placement.rows_per_step, self.asked_placement.own_rows
            rows = self.asked.batch_at(step, size, self.seed, own)
            asked = self.asked_placement.put_own(rows)
            tokens += _own_tokens(rows, size)
        return (self.placement.put_own(batch), window, asked), tokens

    def rows_at(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step [B]."""
        return self.source.rows_at(step, self.placement.rows_per_step, self.seed)

    def save_position(self, step: int) -> None:
        """Writes where streamed data stands after a step; rows in memory have no position."""
        if isinstance(self.source, StreamSource):
            save_position(self.output, step, self.source.position_after(step))


def _own_tokens(batch: TokenBatch, rows_per_step: int) -> int:
    """Tokens that this process counts of its rows: a part where others hold the same rows."""
    part = rows_per_step / (len(batch.tokens) * jax.process_count())
    return round(np.count_nonzero(batch.segment_ids) * part)
