"""Perplexity by position, and the share of the window's loss that the memory recovers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int
from rich.markup import escape
from rich.table import Table

from experiments.data import DataConfig, load_token_data, python_docs_text
from experiments.data.data_files import PYTHON_DOCS
from experiments.data.prompts import document_tokens
from experiments.data.rows import is_text_file, is_whole_text
from experiments.data.special_tokens import begin_tokens, drop_repeated_bos
from experiments.evaluation.blocks import (
    BLOCK,
    Blocks,
    Estimate,
    block_sums,
    intervals,
    recovered_gap,
    text_sums,
)
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, Summary, measured_columns
from experiments.evaluation.variants import ALONE, EQUAL, FULL, MEMORY
from experiments.training.evaluation import losses_by_place
from experiments.training.pictures import (
    new_figure,
    save_figure,
    scale_perplexity,
    scale_tokens,
)
from tptt_jax import CausalLM
from tptt_jax.inference.score import token_losses
from tptt_jax.training.train_step import Batch

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, whole or in rows, or of the held-out rows of a table."""

    data: DataConfig
    tokens: int
    """Most tokens to score."""
    seed: int = 0
    row_tokens: int | None = None
    """Tokens of each row of a text; None: it is one row, read from its beginning."""
    name: str = "perplexity"

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """A text as one row or as many, a table as the rows that finetune holds out.

        Raises:
          ValueError: if there is nothing to score, or row_tokens is given for a table.
        """
        about = {"data": self.data.path, "tokens": self.tokens}
        if is_whole_text(self.data.path):
            text = scored_tokens(self.data, tokenizer, self.tokens)
            if self.row_tokens is None:
                return [Row(about, text)]
            about["row_tokens"] = self.row_tokens
            parts = split_text(text, self.row_tokens, begin_tokens(tokenizer))
            return [Row(about | {"row": i}, part) for i, part in enumerate(parts)]
        if self.row_tokens is not None:
            raise ValueError(
                f"row_tokens divides a text, and {self.data.shown} is a table: set "
                "--data.eval-length for the length of its rows."
            )
        held_out = load_token_data(self.data, tokenizer, self.seed).eval
        if held_out is None:
            raise ValueError(f"no rows of {self.data.shown} are held out: raise --data.eval-rows.")
        about |= {"seed": self.seed, "config": dataclasses.asdict(self.data)}
        rows = [Row(about | {"row": i}, batch) for i, batch in enumerate(held_out.batches(1))]
        counts = np.cumsum([np.count_nonzero(row.data.segment_ids) for row in rows])
        return rows[: max(1, int(np.searchsorted(counts, self.tokens, side="right")))]

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """Summed nats and counted tokens of every block of positions."""
        del tokenizer
        if isinstance(row.data, np.ndarray):
            return score_text(model, row.data, use_memory=use_memory)
        batch = Batch(*jax.device_put(tuple(row.data)))
        nats, counts = map(np.asarray, losses_by_place(model, batch, use_memory=use_memory))
        return block_sums(nats, counts)

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """Perplexity by position and in total, and the recovered gap."""
        del rows
        sums = {name: Blocks.of(found) for name, found in results.items() if found}
        names = measured_columns(results)
        table = Table(
            title=escape(f"{label}: perplexity of {self.data.shown}"), title_justify="left"
        )
        table.add_column("position of the token")
        for name in names:
            table.add_column(name, justify="right")
        report: dict[str, Any] = {"by_position": [], "perplexity": {}, "tokens": 0}
        for first, end in intervals(max(sums[name].width for name in names) * BLOCK):
            found = {name: sums[name].perplexity(first, end) for name in names}
            if not all(math.isnan(estimate.value) for estimate in found.values()):
                shown = [estimate.text() for estimate in found.values()]
                table.add_row(f"{first:,} to {end:,}", *shown)
                part = {"from": first, "to": end, "perplexity": _values(found)}
                report["by_position"].append(part)
        found = {name: sums[name].perplexity(0, None) for name in names}
        table.add_section()
        table.add_row("all", *(estimate.text() for estimate in found.values()))
        report["perplexity"] = _values(found)
        report["standard_error"] = {name: estimate.error for name, estimate in found.items()}
        report["tokens"] = int(sums[names[0]].counts.sum())
        gaps = {name: _recovered(sums, name) for name in names if name not in (FULL, ALONE)}
        known = {name: gap for name, gap in gaps.items() if gap is not None}
        if known:
            cells = [known[name].text() if name in known else "" for name in names]
            table.add_row("of the window's loss recovered", *cells)
            report["recovered_gap"] = {name: gap._asdict() for name, gap in known.items()}
        return Summary(table, report)

    def curves(self, results: Results) -> dict[str, tuple[list[float], list[float]]]:
        """Positions and their perplexities, by column."""
        return {name: Blocks.of(results[name]).curve() for name in measured_columns(results)}

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """Perplexity by position, a panel for each model."""
        del rows
        figure, axes = new_figure(len(results), height=4.5)
        for axis, (label, columns) in zip(axes, results.items(), strict=True):
            for name, curve in self.curves(columns).items():
                axis.plot(*curve, label=name, **LINES[name])
            scale_tokens(axis, "position of the token")
            scale_perplexity(axis)
            axis.set_title(label, loc="left", fontsize=10)
            axis.legend(fontsize=9, edgecolor="none")
        save_figure(figure, png)


def scored_tokens(
    data: DataConfig, tokenizer: "PreTrainedTokenizerFast", most: int
) -> Int[np.ndarray, " L"]:
    """`haystack_tokens` of a text to score.

    Raises:
      ValueError: as `haystack_tokens`, or if there is nothing to predict.
    """
    tokens = haystack_tokens(data, tokenizer, most)
    if len(tokens) < 2:
        raise ValueError(f"{data.path} has fewer than two tokens: nothing can be predicted.")
    return tokens


def split_text(
    text: Int[np.ndarray, " L"], row_tokens: int, begin: Sequence[int]
) -> list[Int[np.ndarray, " l"]]:
    """Consecutive rows of a text, each with the beginning-of-sequence token if the text has one.

    Args:
      text: with `begin` at its beginning.
      row_tokens: tokens of a row; the last one may be shorter.
      begin: as `begin_tokens` gives them.

    Raises:
      ValueError: if a row of so few tokens has nothing to predict.
    """
    size = row_tokens - len(begin)
    if row_tokens < 2 or size < 1:
        raise ValueError(f"rows of {row_tokens} tokens have nothing to predict: use longer ones.")
    body = text[len(begin) :]
    rows = [np.append(begin, body[i : i + size]) for i in range(0, len(body), size)]
    return [row.astype(text.dtype) for row in rows if len(row) > 1]


def score_text(model: CausalLM, tokens: Int[np.ndarray, " L"], *, use_memory: bool) -> Result:
    """Summed nats and counted tokens of every block of a text, read from its beginning."""
    return text_sums(np.concatenate([*token_losses(model, [tokens], use_memory=use_memory)]))


def haystack_tokens(
    data: DataConfig, tokenizer: "PreTrainedTokenizerFast", most: int = 1 << 20
) -> Int[np.ndarray, " L"]:
    """The first tokens of a text, after the beginning-of-sequence token if there is one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the data is a table.
    """
    if data.path == PYTHON_DOCS:
        ids = tokenizer(python_docs_text(), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = drop_repeated_bos(tokenizer, [*begin_tokens(tokenizer), *ids])
        return np.asarray(tokens[:most], np.int32)
    if not isinstance(data.path, str) or not is_text_file(data.path):
        if isinstance(data.path, str) and not Path(data.path).expanduser().exists():
            raise FileNotFoundError(f"no such file: {data.path}; check the path.")
        raise ValueError(f"{data.shown} is a table: this task needs a text file.")
    parts, count = [np.zeros(0, np.int32)], 0
    for piece in document_tokens(tokenizer, Path(data.path).expanduser()):
        parts.append(piece)
        count += len(piece)
        if count >= most:
            break
    return np.concatenate(parts)[:most]


LINES: dict[str, dict[str, Any]] = {
    FULL: {"color": "#1a1a1a", "linewidth": 2},
    ALONE: {"color": "#d94801", "linewidth": 2},
    EQUAL: {"color": "#fdae6b", "linewidth": 2, "linestyle": "--"},
    MEMORY: {"color": "#08519c", "linewidth": 2.5, "marker": "o", "markersize": 3},
}


def _recovered(sums: Mapping[str, Blocks], name: str) -> Estimate | None:
    if not {FULL, ALONE, name} <= sums.keys():
        return None
    return recovered_gap(sums[FULL], sums[ALONE], sums[name])


def _values(found: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: each.value for name, each in found.items() if not math.isnan(each.value)}
