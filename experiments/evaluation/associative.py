"""Multi-query associative recall (MQAR, arXiv:2312.04927), in words: pairs, then their keys again.

A row is filled with pairs of words and a number. Keys at its end ask for their numbers; the right
answer follows each key. All answers come from one forward pass: an answer is right if each of its
tokens is the most likely one.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.markup import escape
from rich.table import Table

from experiments.data.probes import WORDS, encode_text
from experiments.data.special_tokens import begin_tokens
from experiments.evaluation.perplexity import LINES
from experiments.evaluation.shares import percents_by_length, shares_at
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, Summary, measured_columns
from experiments.models.limits import check_lengths, check_tokens
from experiments.training.pictures import new_figure, save_figure, scale_tokens
from tptt_jax import CausalLM
from tptt_jax.array_typing import Array

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_QUERIES = 8
_NAMES = [f"{a} {b}" for a, b in itertools.permutations(WORDS, 2)]
# Tokens; numbers have three digits.
_LONGEST_ANSWER = 6


@dataclass(frozen=True)
class AssociativeRecall:
    """Rows of `lengths` tokens, with as many pairs as fit."""

    lengths: tuple[int, ...]
    samples: int
    """Rows of each length."""
    seed: int = 0
    name: str = "recall"

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """Rows of pairs and questions, with the places of the answers."""
        return [
            self._row(tokenizer, length, sample)
            for length in self.lengths
            for sample in range(self.samples)
        ]

    def _row(self, tokenizer: "PreTrainedTokenizerFast", length: int, sample: int) -> Row:
        rng = np.random.default_rng([self.seed, length, sample, 7, 7, 7])
        encode = functools.partial(encode_text, tokenizer)
        order = rng.permutation(len(_NAMES))
        start, join = np.asarray(begin_tokens(tokenizer), np.int32), encode("\n")

        def pair(index: int) -> tuple[np.ndarray, np.ndarray]:
            return encode(f" {_NAMES[order[index]]} ="), encode(f" {rng.integers(100, 1000)}")

        pairs, used = [], len(start)
        longest = 0
        while len(pairs) < len(_NAMES):
            new = pair(len(pairs))
            size = len(new[0]) + len(new[1]) + len(join)
            longest = max(longest, size)
            if used + size + _QUERIES * longest > length:
                break
            pairs.append(new)
            used += size
        else:
            raise ValueError(
                f"recall: {length} tokens hold more than the {len(_NAMES):,} pairs that have names "
                "of their own: give shorter --lengths."
            )
        if len(pairs) < _QUERIES:
            raise ValueError(
                f"recall: {length} tokens hold {len(pairs)} pairs, fewer than the {_QUERIES} "
                "queries: give longer --lengths."
            )
        asked = rng.choice(len(pairs), _QUERIES, replace=False)
        tokens, places = [start], []
        count = len(start)
        for index in [*range(len(pairs)), *asked.tolist()]:
            key, value = pairs[index]
            tokens += [key, value, join]
            places.append((count + len(key), count + len(key) + len(value)))
            count += len(key) + len(value) + len(join)
        row = np.zeros(length, np.int32)
        row[:count] = np.concatenate(tokens)
        about = {"seed": self.seed, "length": length, "sample": sample}
        return Row(about | {"pairs": len(pairs)}, (row, count, places[-_QUERIES:]))

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """The share of right answers."""
        tokens, count, places = row.data
        valid = (np.arange(len(tokens)) < count).astype(np.int32)
        check_lengths(valid[None], model.config, "--lengths")
        check_tokens(tokens[:count], model.config.vocab_size, tokenizer)
        asked = [range(start, end) for start, end in places]
        # Answers differ in length; padding lets one program serve all rows.
        flat = np.zeros(_QUERIES * _LONGEST_ANSWER, np.int32)
        indices = np.concatenate(asked)
        flat[: len(indices)] = indices
        arrays = jax.device_put((tokens[None], valid[None], flat))
        likeliest = _likeliest(model, *arrays, use_memory=use_memory)
        is_right = dict(zip(indices.tolist(), np.asarray(likeliest) == tokens[flat], strict=False))
        right = [all(is_right[place] for place in places) for places in asked]
        return {"right": float(np.mean(right))}

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """Shares of right answers by length."""
        table = Table(
            title=f"{escape(label)}: recall, % of {_QUERIES} queries right, "
            f"{self.samples} rows each",
            title_justify="left",
        )
        table.add_column("tokens", justify="right")
        table.add_column("pairs", justify="right")
        for name in measured_columns(results):
            table.add_column(name, justify="right")
        by_length: list[dict[str, Any]] = []
        for length in self.lengths:
            cells, means = shares_at(rows, results, length)
            pairs = [row.about["pairs"] for row in rows if row.about["length"] == length]
            table.add_row(f"{length:,}", f"{np.mean(pairs):.0f}", *cells)
            by_length.append({"length": length, "pairs": float(np.mean(pairs)), "right": means})
        return Summary(table, {"by_length": by_length})

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """Shares of right answers by length, a panel for each model."""
        figure, axes = new_figure(len(results), height=4)
        for axis, (label, columns) in zip(axes, results.items(), strict=True):
            for name, found in columns.items():
                means = percents_by_length(rows[label], found, self.lengths)
                axis.plot(self.lengths, means, label=name, **LINES[name])
            scale_tokens(axis, "tokens of the row")
            axis.set_ylim(-2, 102)
            axis.set_ylabel("% of queries right")
            axis.set_title(label, loc="left", fontsize=10)
            axis.legend(fontsize=9, edgecolor="none")
        save_figure(figure, png)


@functools.partial(nnx.jit, static_argnames="use_memory")
def _likeliest(
    model: CausalLM, tokens: Array, valid: Array, places: Array, *, use_memory: bool
) -> Array:
    """The most likely tokens at some places of a row [N], each predicted from the place before."""
    hidden, _, _ = model.forward_hidden(tokens, valid, use_memory=use_memory)
    return jnp.argmax(model.project_logits(hidden[:, places - 1]), axis=-1)[0]
