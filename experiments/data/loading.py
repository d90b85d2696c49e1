"""From a path to rows of tokens, part of them held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.data.bad_rows import BadRows
from experiments.data.columns import Format, find_format, read_columns, rename_columns
from experiments.data.config import DataConfig
from experiments.data.data_files import FoundData
from experiments.data.formats import cut_document, row_examples, text_cells, text_documents
from experiments.data.packing import Example, TokenBatchSource, lay_out, pack_examples
from experiments.data.recall_rows import recall_examples
from experiments.data.rows import Rows, load_rows
from experiments.data.special_tokens import begin_tokens

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_LONGEST_HELD_OUT_ROW = 2048
_ANSWERS: dict[Format, str] = {
    "alpaca": "output",
    "chat": 'messages of the role "assistant" without "weight": 0',
    "sharegpt": "turns of gpt",
    "prompt-completion": "completion",
    "question-answer": "answer",
}
"""Where the answers of a format are."""


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """Rows of tokens to train on and to evaluate on, and statistics of the data."""

    train: TokenBatchSource
    eval: TokenBatchSource | None
    """None if nothing is held out."""
    asked: TokenBatchSource | None = None
    """Rows that ask for something, if they train the memory alone; else they are among `train`."""
    format: Format
    """The format of the data."""
    num_documents: int
    """Rows of the table that were read; 1 for a whole text."""
    num_truncated: int
    """Examples that were truncated to sequence_length."""
    num_without_targets: int
    """Examples left out because none of their tokens would count in the loss."""
    bad_rows: tuple[str, ...] = ()
    """What is wrong with each row that was left out because it cannot be read."""

    def describe(self, batch_size: int = 1) -> str:
        """One line for people.

        Args:
          batch_size: rows per step; the line mentions it if it exceeds the number of rows.
        """
        train = self.train
        filled = train.num_tokens / train.tokens.size
        parts = [
            f"{self.num_documents:,} document{'s' if self.num_documents != 1 else ''} "
            f"({self.format}): {train.num_rows:,} rows of {train.sequence_length} tokens to train "
            f"on ({filled:.0%} full, {train.num_targets:,} targets)"
        ]
        if self.eval is not None:
            parts.append(f"{self.eval.num_targets:,} targets held out")
        if self.asked is not None:
            parts.append(f"{self.asked.num_rows:,} rows that ask, for the memory alone")
        if self.num_truncated:
            parts.append(f"{self.num_truncated:,} examples truncated")
        if self.num_without_targets:
            parts.append(
                f"{self.num_without_targets:,} left out because nothing in them counts in the loss"
            )
        if self.bad_rows:
            parts.append(f"{len(self.bad_rows):,} bad rows left out")
        if batch_size > train.num_rows:
            parts.append(
                f"fewer rows than a step of {batch_size}, which repeats them: lower --batch-size "
                "or --accumulate"
            )
        return ", ".join(parts)


def load_token_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int = 0,
    *,
    window: int | None = None,
    files: FoundData | None = None,
    strict: bool = True,
) -> TokenData:
    """Reads, tokenises, splits and packs the data that `config` describes.

    Args:
      config: what to read and how.
      tokenizer: of the model that will read the tokens.
      seed: chooses which rows of a table are held out.
      window: of the model, for rows that ask for something beyond it; None: half a row.
      files: what `find_data` has found for `config`; None: it is called.
      strict: whether a row that cannot be read is an error; otherwise it is left out.

    Returns:
      Arrays of int32 tokens and segment ids and of boolean loss masks, [rows, sequence_length].

    Raises:
      FileNotFoundError: if the data does not exist.
      ValueError: if it cannot be read or leaves nothing to train on.
    """
    if config.streaming:
        raise ValueError(
            "--data.streaming is for training, and all rows are read here: leave it out."
        )
    bad = BadRows(strict=strict)
    rows, found, parts = _read(config, tokenizer, seed, bad, files)
    lengths = (config.sequence_length, _held_out_length(rows, config))
    kept, held_out = (_fit(*pair) for pair in zip(parts, lengths, strict=True))
    _check_useful(kept, parts[0], rows, found, config)
    train, held_out_rows = (
        pack_examples(part.examples, length, packing=config.packing)
        for part, length in zip((kept, held_out), lengths, strict=True)
    )
    asked = None
    if config.recall:
        texts = kept.examples
        if config.recall_haystacks:
            texts = _haystacks(config, tokenizer, bad)
        asked = _recall_rows(train, texts, config, tokenizer, window=window, seed=seed)
        if config.recall_trains == "all":
            train, asked = train.joined(asked), None
    return TokenData(
        train=train,
        eval=held_out_rows if held_out_rows.num_rows else None,
        asked=asked,
        format=found,
        num_documents=len(rows.rows),
        num_truncated=kept.num_truncated + held_out.num_truncated,
        num_without_targets=kept.num_without_targets + held_out.num_without_targets,
        bad_rows=tuple(bad.messages),
    )


def _read(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    bad: BadRows,
    files: FoundData | None = None,
) -> tuple[Rows, Format, tuple[list[Example], list[Example]]]:
    """The rows of a source, their format, and their examples: to train on, and held out."""
    rows = load_rows(config.path, config.split, config.max_rows, config.revision, files=files)
    rows = rename_columns(rows, read_columns(config.columns))
    found = find_format(rows, config.format, config.text_column)
    if rows.is_document:
        return rows, found, _split_document(rows, config, tokenizer)
    examples = _row_examples(rows, found, config, tokenizer, bad)
    return rows, found, _split_rows(examples, rows.source, config, seed)


class _Fitted(NamedTuple):
    examples: list[Example]
    num_truncated: int
    num_without_targets: int


def _check_useful(
    kept: _Fitted, examples: list[Example], rows: Rows, found: Format, config: DataConfig
) -> None:
    """Raises ValueError unless something of the examples to train on counts in the loss."""
    if found != "text" and examples and not any(example.targets.any() for example in examples):
        raise ValueError(
            f"{rows.source} ({found}) has no answer that counts in the loss: expected text in "
            f"{_ANSWERS[found]}; repair the rows, or use --data.loss all."
        )
    if not kept.examples:
        raise ValueError(
            f"No example of {rows.source} has a token left that counts in the loss at "
            f"sequence_length = {config.sequence_length}: raise --data.sequence-length, or use "
            "--data.loss all."
        )
    if kept.num_truncated == len(examples):
        shortest = min(len(example.tokens) for example in examples)
        raise ValueError(
            f"Every example of {rows.source} is longer than sequence_length = "
            f"{config.sequence_length}: raise --data.sequence-length to {shortest} or more."
        )


def _haystacks(
    config: DataConfig, tokenizer: "PreTrainedTokenizerFast", bad: BadRows
) -> list[Example]:
    """The texts of --data.recall-haystacks, whole; rows that cannot be read join `bad`."""
    other = config.of_other(config.recall_haystacks, eval_tokens=0, eval_rows=0.0)
    own = BadRows(strict=bad.strict)
    _, _, (texts, _) = _read(other, tokenizer, 0, own)
    bad.messages.extend(own.messages)
    return texts


def _recall_rows(
    train: TokenBatchSource,
    texts: list[Example],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    window: int | None,
    seed: int,
) -> TokenBatchSource:
    """As many rows that ask for something as `config.recall` says."""
    begin, length = begin_tokens(tokenizer), config.recall_row_length
    asked = recall_examples(
        tokenizer,
        # Rows have one beginning, their own.
        [_without(begin, example) for example in texts],
        round(train.num_rows * config.recall / (1 - config.recall)),
        length=length,
        window=length // 2 if window is None else window,
        seed=seed,
        prefix=begin,
        kinds=config.recall_kinds,
        count_text=config.recall_text,
        packing=config.packing,
        option="--data.sequence-length" if config.recall_length is None else "--data.recall-length",
    )
    return lay_out(asked, length)


def _fit(examples: list[Example], length: int) -> _Fitted:
    """Truncates examples to `length` and leaves out those without targets."""
    cut = [Example(tokens[:length], targets[:length]) for tokens, targets in examples]
    useful = [example for example in cut if example.targets.any()]
    truncated = sum(len(example.tokens) > length for example in examples)
    return _Fitted(useful, truncated, len(cut) - len(useful))


def _without(begin: Sequence[int], example: Example) -> Example:
    """An example without the tokens that a text begins with."""
    start = len(begin) if list(example.tokens[: len(begin)]) == list(begin) else 0
    return Example(example.tokens[start:], example.targets[start:])


def _split_document(
    rows: Rows, config: DataConfig, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[list[Example], list[Example]]:
    """A text after the first `eval_tokens` tokens, and these tokens."""
    (tokens,) = text_documents(tokenizer, text_cells(rows, "text"))
    if len(tokens) < config.eval_tokens + 2:
        raise ValueError(
            f"{rows.source} has {len(tokens)} tokens, of which eval_tokens = {config.eval_tokens} "
            "are held out: nothing is left to train on; lower --data.eval-tokens."
        )
    prefix = begin_tokens(tokenizer)
    held_out = tokens[: config.eval_tokens]
    length = _held_out_length(rows, config)
    return (
        cut_document(tokens[config.eval_tokens :], config.sequence_length, prefix),
        cut_document(held_out, length, prefix) if len(held_out) else [],
    )


def _held_out_length(rows: Rows, config: DataConfig) -> int:
    """A text is evaluated in long rows, where a memory matters; a table in training rows."""
    if not rows.is_document:
        return config.sequence_length
    if config.eval_length is not None:
        return config.eval_length
    return max(config.sequence_length, min(config.eval_tokens + 1, _LONGEST_HELD_OUT_ROW))


def _row_examples(
    rows: Rows,
    found: Format,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    bad: BadRows,
) -> list[list[Example]]:
    """The examples of each row that can be read: one, or the pieces of a long text."""
    if found != "text":
        examples = row_examples(tokenizer, rows, found, config.loss, bad)
        bad.check_any_good()
        return [[example] for example in examples]
    prefix, texts = begin_tokens(tokenizer), text_cells(rows, config.text_column, bad)
    bad.check_any_good()
    return [
        cut_document(document, config.sequence_length, prefix)
        for document in text_documents(tokenizer, texts)
    ]


def _split_rows(
    rows: list[list[Example]], source: str, config: DataConfig, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and the held-out ones."""
    total, count = len(rows), int(config.eval_rows)
    if 0 < config.eval_rows < 1:
        count = max(1, round(total * config.eval_rows))
    if count >= total:
        raise ValueError(
            f"{source} has {total} row{'s' if total != 1 else ''} and {count} would be held out, "
            "which leaves nothing to train on: lower --data.eval-rows (0 holds out nothing)."
        )
    held_out = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    return (
        [example for i, row in enumerate(rows) if i not in held_out for example in row],
        [example for i, row in enumerate(rows) if i in held_out for example in row],
    )
