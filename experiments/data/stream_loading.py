"""From a configuration to a stream of rows, and to the rows that are held out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.data.bad_rows import BadRows
from experiments.data.config import DataConfig
from experiments.data.data_files import FoundData, find_parts
from experiments.data.indexed_rows import index_rows
from experiments.data.packing import Example, TokenBatchSource, pack_examples
from experiments.data.stream_table import StreamTable
from experiments.data.streaming import StreamSource

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class StreamData:
    """Rows that are made while training, and those that are held out, as `TokenData`."""

    train: StreamSource
    eval: TokenBatchSource | None
    """None if nothing is held out."""
    tables: list[StreamTable]
    bad_rows: tuple[str, ...] = ()
    """What is wrong with each held-out row that cannot be read; others are named in training."""

    def describe(self, batch_size: int = 1) -> str:
        """One line for people."""
        shown = (
            f"{table.num_rows:,} rows of {table.shown} ({table.format})" for table in self.tables
        )
        held_out = 0 if self.eval is None else self.eval.num_targets
        line = f"streaming {', '.join(shown)} to train on, {held_out:,} targets held out"
        return f"{line}, {len(self.bad_rows):,} bad rows left out" if self.bad_rows else line


def load_stream(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    *,
    rows_per_step: int,
    order_seed: int,
    files: FoundData | None = None,
    strict: bool = False,
) -> StreamData:
    """Prepares the data that `config` describes for streaming.

    Args:
      config: what to read and how.
      tokenizer: of the model that will read the tokens.
      seed: chooses which rows are held out.
      rows_per_step: rows of a batch over all processes.
      order_seed: of the order of the documents.
      files: what `find_parts` has found for `config`; None: it is called.
      strict: a row that cannot be read is an error; otherwise it is left out and named.

    Raises:
      FileNotFoundError: if the data does not exist.
      ValueError: if it cannot be read or leaves nothing to train on.
    """
    tables = _tables(config, tokenizer, seed, files)
    held_out, bad_rows = _packed(tables, StreamTable.held_out, config, strict=strict)
    source = StreamSource(
        tables,
        config.weights or (1.0,),
        rows_per_step=rows_per_step,
        sequence_length=config.sequence_length,
        packing=config.packing,
        seed=order_seed,
        strict=strict,
    )
    return StreamData(
        train=source,
        eval=held_out if held_out.num_rows else None,
        tables=tables,
        bad_rows=bad_rows,
    )


def sample_rows(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    count: int,
    files: FoundData | None = None,
    *,
    strict: bool = False,
) -> tuple[TokenBatchSource, tuple[str, ...]]:
    """Rows of about `count` examples of all data sets in equal parts, in memory.

    Arguments as those of `load_stream`.

    Returns:
      The rows, and what is wrong with each row that was left out because it cannot be read.
    """
    tables = _tables(config, tokenizer, seed, files)
    each = -(-count // len(tables))
    return _packed(
        tables, lambda table, bad: table.first_examples(each, bad), config, strict=strict
    )


def _packed(
    tables: list[StreamTable],
    take: Callable[[StreamTable, BadRows], list[Example]],
    config: DataConfig,
    *,
    strict: bool,
) -> tuple[TokenBatchSource, tuple[str, ...]]:
    """Rows of the examples that `take` reads of each table, and what is wrong with bad rows."""
    examples: list[Example] = []
    bad_rows: list[str] = []
    for table in tables:
        bad = BadRows(strict=strict)
        examples += take(table, bad)
        bad_rows += bad.messages
    rows = pack_examples(examples, config.sequence_length, packing=config.packing)
    return rows, tuple(bad_rows)


def _tables(
    config: DataConfig, tokenizer: "PreTrainedTokenizerFast", seed: int, files: FoundData | None
) -> list[StreamTable]:
    found = files or find_parts(
        config.path, config.split, config.revision, separate=bool(config.weights)
    )
    parts = found.parts or (found,)
    return [
        StreamTable(
            index_rows(
                part, config.split, config.revision if part.is_hub else None, config.max_rows
            ),
            config,
            tokenizer,
            seed,
        )
        for part in parts
    ]
