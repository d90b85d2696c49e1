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
    asked = data.asked if isinstance(data, TokenData) else None
    sources = {
        "--data.sequence-length": data.train,
        "--data.recall-length": asked,
        "--data.eval-length": data.eval,
    }
    for flag, source in sources.items():
        if isinstance(source, TokenBatchSource):
            check_lengths(source.segment_ids, model, flag)
            check_tokens(source.tokens, model.vocab_size, tokenizer)


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
        source = self.source
        if isinstance(source, StreamSource) and source.step != step:
            source.seek(step, read_position(self.output, step))
        batch, tokens = self._read(source, self.placement, step)
        if isinstance(source, StreamSource):
            check_lengths(batch.segment_ids, self.model, "--data.sequence-length")
            check_tokens(batch.tokens, self.model.vocab_size, self.tokenizer)
        window = None
        if self.windows is not None:
            window = jnp.asarray(self.windows.draw(self.seed, "train", step))
        asked = None
        if self.asked is not None:
            rows, more = self._read(self.asked, self.asked_placement, step)
            asked, tokens = self.asked_placement.put_own(rows), tokens + more
        return (self.placement.put_own(batch), window, asked), tokens

    def _read(
        self, source: TokenBatchSource | StreamSource, placement: Placement, step: int
    ) -> tuple[TokenBatch, int]:
        """This process's rows of a step, and the tokens that it counts of them."""
        size = placement.rows_per_step
        batch = source.batch_at(step, size, self.seed, placement.own_rows)
        # Where devices of several processes share rows, each of them counts a part.
        part = size / (len(batch.tokens) * jax.process_count())
        return batch, round(np.count_nonzero(batch.segment_ids) * part)

    def rows_at(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step [B]."""
        return self.source.rows_at(step, self.placement.rows_per_step, self.seed)

    def save_position(self, step: int) -> None:
        """Writes where streamed data stands after a step; rows in memory have no position."""
        if isinstance(self.source, StreamSource):
            save_position(self.output, step, self.source.position_after(step))
