"""Sentences hidden in a long text and a question about them at its end, by length and depth.

"passkey" is Mohtashami and Jaggi's task (arXiv:2305.16300); the needles and variable tracking are
synthetic tasks as RULER describes them (arXiv:2404.06654), in words of our own. Answers are
generated greedily. Pass keys are asked for in the words that `--data.recall` trains on, with keys
and places of other seeds; the other tasks have words and numbers of their own.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from rich.markup import escape
from rich.table import Table

from experiments.data import DataConfig
from experiments.data.probes import WORDS, Probe, encode_text, hide, passkey
from experiments.data.special_tokens import begin_tokens
from experiments.evaluation.perplexity import haystack_tokens
from experiments.evaluation.shares import right_shares, shares_at
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, Summary, measured_columns
from experiments.evaluation.variants import COLUMNS
from experiments.training.pictures import save_figure
from tptt_jax import CausalLM, generate

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_Hidden = tuple[Probe, tuple[str, ...]]
"""The probe, and everything that a right answer contains."""


def _passkey(rng: np.random.Generator) -> _Hidden:
    key = str(rng.integers(10_000, 100_000))
    return passkey(key), (key,)


def _needle(count: int, asked: int) -> Callable[[np.random.Generator], _Hidden]:
    """`count` similar sentences, `asked` of which have the key of the question."""

    def make(rng: np.random.Generator) -> _Hidden:
        words = rng.choice(WORDS, count - asked + 1, replace=False).tolist()
        keys = [words[0]] * asked + words[1:]
        numbers = [str(rng.integers(1_000_000, 10_000_000)) for _ in keys]
        noun, verb = ("number", "is") if asked == 1 else ("numbers", "are")
        question = (
            f"\nWhich {noun} {verb} noted for {words[0]} in the text above? The {noun} noted for "
            f"{words[0]} {verb}"
        )
        hidden = tuple(
            f" The number noted for {key} is {number}. "
            for key, number in zip(keys, numbers, strict=True)
        )
        right = tuple(numbers[:asked])
        return Probe(hidden, question, " " + ", ".join(right)), right

    return make


def _variables(rng: np.random.Generator) -> _Hidden:
    """A chain of assignments; the question asks for all variables with a value."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choice(list(letters), 3))
        if name not in names:
            names.append(name)
    value = str(rng.integers(10_000, 100_000))
    hidden = [f" VAR {names[0]} = {value}. "]
    hidden += [f" VAR {new} = VAR {old}. " for old, new in itertools.pairwise(names)]
    question = f"\nWhich variables have the value {value}? The variables with the value {value} are"
    return Probe(tuple(hidden), question, " " + ", ".join(names)), tuple(names)


_KINDS: dict[str, tuple[Callable[[np.random.Generator], _Hidden], int, bool]] = {
    "passkey": (_passkey, 8, False),
    "needle-single": (_needle(1, 1), 12, False),
    "needle-multikey": (_needle(4, 1), 12, False),
    "needle-multivalue": (_needle(4, 4), 48, False),
    "variable-tracking": (_variables, 32, True),
}
"""For each task: its probe, tokens of an answer, and whether the order of sentences matters."""

NEEDLES = tuple(_KINDS)


@dataclass(frozen=True)
class Needles:
    """One of the tasks of `NEEDLES`."""

    name: str
    data: DataConfig
    lengths: tuple[int, ...]
    """Prompt lengths in tokens."""
    depths: tuple[float, ...]
    """Places of the first sentence, from 0, the beginning, to 1, before the question."""
    samples: int
    """Prompts for each length and depth."""
    seed: int = 0

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """A prompt for each length, depth and sample."""
        text = haystack_tokens(self.data, tokenizer)
        # Every prompt adds its own beginning-of-sequence token.
        text = text[len(begin_tokens(tokenizer)) :]
        if not len(text):
            raise ValueError(f"{self.name}: {self.data.shown} is empty: name a text to hide it in.")
        return [
            self._row(tokenizer, text, length, depth, sample)
            for length in self.lengths
            for depth in self.depths
            for sample in range(self.samples)
        ]

    def _row(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        text: Int[np.ndarray, " L"],
        length: int,
        depth: float,
        sample: int,
    ) -> Row:
        where = round(depth * 1000)
        # Seeds of five numbers: no training row uses such a seed.
        rng = np.random.default_rng([self.seed, length, where, sample, NEEDLES.index(self.name)])
        make, _, is_ordered = _KINDS[self.name]
        probe, right = make(rng)
        try:
            prompt = hide(
                probe,
                functools.partial(encode_text, tokenizer),
                text,
                rng,
                length=length,
                depth=depth,
                is_ordered=is_ordered,
                prefix=begin_tokens(tokenizer),
                option="--lengths",
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        about = {"data": self.data.path, "seed": self.seed, "length": length, "depth": depth}
        about |= {"sample": sample}
        return Row(about, (prompt.tokens, probe, right))

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """The answer, and the share of expected items that it contains."""
        prompt, _, right = row.data
        result = generate(model, prompt[None], _KINDS[self.name][1], use_memory=use_memory)
        new = np.asarray(result.tokens[0, : int(result.lengths[0])])
        answer = str(tokenizer.decode(new, skip_special_tokens=True)).split("\n")[0].strip()
        named = sum(each in answer for each in right)
        return {"right": named / len(right), "answer": answer}

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """Shares of right answers by length, over all depths, and one question with its answers."""
        names = measured_columns(results)
        table = Table(
            title=f"{escape(label)}: {self.name}, % right, {len(self.depths)} depths x "
            f"{self.samples}",
            title_justify="left",
        )
        table.add_column("tokens", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        report: dict[str, Any] = {"by_length": [], "right": {}}
        for length in self.lengths:
            cells, means = shares_at(rows, results, length)
            table.add_row(f"{length:,}", *cells)
            report["by_length"].append({"length": length, "right": means})
        whole = {name: right_shares(rows, results[name]) for name in names}
        report["right"] = {name: float(np.mean(found)) for name, found in whole.items()}
        _, probe, right = rows[0].data
        lines = [f"hidden: {' '.join(part.strip() for part in probe.hidden)}"]
        lines += [f"asked: {probe.question.strip()}  (right: {', '.join(right)})"]
        lines += [f"{name}: {results[name][0]['answer']}" for name in names]
        return Summary(table, report, "\n".join(lines))

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """Draws a map of depth by length for every model and column."""
        from matplotlib.figure import Figure

        columns = [n for n in COLUMNS if any(found.get(n) for found in results.values())]
        figure = Figure(
            figsize=(3.2 * len(columns) + 1, 3.0 * len(results) + 0.6),
            dpi=150,
            layout="constrained",
        )
        axes = figure.subplots(len(results), len(columns), squeeze=False)
        image = None
        for line, (label, found) in zip(axes, results.items(), strict=True):
            for axis, name in zip(line, columns, strict=True):
                image = axis.imshow(
                    self._map(rows[label], found.get(name, ())),
                    vmin=0,
                    vmax=100,
                    cmap="RdYlGn",
                    aspect="auto",
                )
                axis.set_title(f"{label}\n{name}" if name == columns[0] else name, fontsize=9)
                axis.set_xticks(range(len(self.lengths)), [f"{n:,}" for n in self.lengths])
                axis.set_yticks(range(len(self.depths)), [f"{d:.0%}" for d in self.depths])
                axis.set_xlabel("tokens")
        axes[0][0].set_ylabel("depth of the first sentence")
        assert image is not None
        figure.colorbar(image, ax=axes, label="% right")
        figure.suptitle(self.name, x=0.01, ha="left", fontweight="bold")
        save_figure(figure, png)

    def _map(self, rows: Sequence[Row], results: Sequence[Result]) -> np.ndarray:
        """Percent of right answers [depths, lengths]; NaN where nothing was measured."""
        return np.array(
            [
                [
                    100 * np.mean(found)
                    if len(found := right_shares(rows, results, length=length, depth=depth))
                    else math.nan
                    for length in self.lengths
                ]
                for depth in self.depths
            ]
        )
