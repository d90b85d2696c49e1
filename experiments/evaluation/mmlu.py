"""MMLU as TPTT measures it (arXiv:2506.17671): one example before each question.

An answer is generated greedily and compared with the right letter, exactly (EM), as a prefix (PEM)
and as a prefix once both are normalized (PQEM). Accuracy is the share of questions whose right
letter is the most likely of the letters.
"""

import math
import string
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

from experiments.evaluation.bars import plot_bars
from experiments.evaluation.blocks import Estimate
from experiments.evaluation.exact_match import (
    exact_match,
    prefix_exact_match,
    prefix_quasi_exact_match,
)
from experiments.evaluation.likelihood import Continuation, pad_prompts, score_continuations
from experiments.evaluation.mmlu_data import (
    MmluConfig,
    choose_evenly,
    load_questions,
    one_shot_prompt,
)
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, Summary, measured_columns
from tptt_jax import CausalLM, DecodingState, generate, read
from tptt_jax.array_typing import Array, Float

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

# As in LightEval's task of this form.
_NEW_TOKENS = 5
_STOP = "\n"
METRICS = ("accuracy", "EM", "PEM", "PQEM")


@dataclass(frozen=True)
class Mmlu:
    """Questions with one example each."""

    config: MmluConfig
    name: str = "mmlu"

    @property
    def rows_at_once(self) -> int:
        """Questions answered at a time."""
        return self.config.batch_size

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """A row for each question."""
        del tokenizer
        questions, examples = load_questions(self.config.data)
        rows = []
        for question in choose_evenly(questions, self.config.limit):
            prompt = one_shot_prompt(question, examples[question.subject])
            about = {"subject": question.subject, "prompt": prompt, "letter": question.letter}
            rows.append(Row(about, question))
        return rows

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """The answer to one question, and its scores."""
        return self.measure_rows(model, tokenizer, [row], use_memory=use_memory)[0]

    def measure_rows(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        rows: Sequence[Row],
        *,
        use_memory: bool,
    ) -> list[Result]:
        """The answers to some questions, and their scores."""
        most = model.config.max_positions - _NEW_TOKENS
        prompts = [tokenizer.encode(row.about["prompt"])[-most:] for row in rows]
        tokens, valid = pad_prompts(prompts, self.config.batch_size)
        state = read(model, tokens, valid, use_memory=use_memory)
        texts = _answers(model, tokenizer, state, use_memory=use_memory)
        chances = _next_token_chances(model, state)
        results = []
        for row, prompt, text, next_token in zip(rows, prompts, texts, chances, strict=False):
            letters = _letters(tokenizer, row)
            if all(len(each) == 1 for each in letters):
                nats = [float(next_token[each[0]]) for each in letters]
            else:
                nats = _score_letters(model, prompt, letters, use_memory=use_memory)
            gold = row.about["letter"]
            results.append(
                {
                    "answer": text,
                    "nats": nats,
                    "accuracy": int(np.argmax(nats)) == row.data.answer,
                    "EM": exact_match(text, gold),
                    "PEM": prefix_exact_match(text, gold),
                    "PQEM": prefix_quasi_exact_match(text, gold),
                }
            )
        return results

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """Averages over all questions, and in the report those of each subject."""
        columns = measured_columns(results)
        table = Table(
            title=f"{escape(label)}: MMLU, one-shot, % of {len(rows):,} questions",
            title_justify="left",
        )
        table.add_column("metric")
        for name in columns:
            table.add_column(name, justify="right")
        subjects: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            subjects.setdefault(row.about["subject"], []).append(index)
        averages = _averages(results, range(len(rows)))
        for metric in METRICS:
            cells = [_percent(*averages[metric][name]) for name in columns]
            table.add_row(metric, *cells)
        report = {
            "questions": len(rows),
            "average": _report(averages),
            "by_subject": {
                subject: {"questions": len(places), **_report(_averages(results, places))}
                for subject, places in subjects.items()
            },
        }
        lines = [f"asked: {rows[0].data.text}  (right: {rows[0].about['letter']})"]
        lines += [f"{name}: {results[name][0]['answer'].strip()}" for name in columns]
        return Summary(table, report, "\n".join(lines))

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """A panel for each model with a group of bars for each metric."""
        panels = []
        for label, columns in results.items():
            averages = _averages(columns, range(len(rows[label])))
            bars = {
                metric: {name: (100 * value, 100 * error) for name, (value, error) in each.items()}
                for metric, each in averages.items()
            }
            panels.append([(f"{label}: MMLU, one-shot", bars)])
        plot_bars(png, panels, "% of questions")


def _answers(
    model: CausalLM, tokenizer: "PreTrainedTokenizerFast", state: DecodingState, *, use_memory: bool
) -> list[str]:
    """Greedy continuations, up to the end of the line."""
    result = generate(
        model,
        np.zeros((state.batch_size, 0), np.int32),
        _NEW_TOKENS,
        state=state,
        stop_strings=(_STOP,),
        decode=tokenizer.decode,
        use_memory=use_memory,
    )
    new, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
    texts = [
        str(tokenizer.decode(row[:count], skip_special_tokens=True))
        for row, count in zip(new, lengths, strict=True)
    ]
    return [text.split(_STOP)[0] for text in texts]


def _next_token_chances(model: CausalLM, state: DecodingState) -> Float[np.ndarray, "B V"]:
    return np.asarray(_log_softmax(model, state.hidden))


@nnx.jit
def _log_softmax(model: CausalLM, hidden: Array) -> Float[Array, "B V"]:
    logits = model.project_logits(hidden[:, None])[:, 0]
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def _letters(tokenizer: "PreTrainedTokenizerFast", row: Row) -> list[list[int]]:
    """Tokens of each letter after the prompt."""
    count = len(tokenizer.encode(row.about["prompt"]))
    letters = string.ascii_uppercase[: len(row.data.choices)]
    return [tokenizer.encode(f"{row.about['prompt']} {letter}")[count:] for letter in letters]


def _score_letters(
    model: CausalLM, prompt: list[int], letters: Sequence[list[int]], *, use_memory: bool
) -> list[float]:
    """Log-likelihoods of letters that take more than one token."""
    scores = score_continuations(
        model,
        [Continuation(prompt, tokens) for tokens in letters],
        batch_size=len(letters),
        max_length=model.config.max_positions,
        use_memory=use_memory,
    )
    return [each.nats for each in scores]


def _averages(results: Results, places: Sequence[int]) -> dict[str, dict[str, Estimate]]:
    """By metric and column, over the rows at these places."""
    return {
        metric: {
            name: Estimate.of(
                [float(results[name][i][metric]) for i in places if i < len(results[name])]
            )
            for name in measured_columns(results)
        }
        for metric in METRICS
    }


def _report(averages: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {
        metric: {name: estimate.report for name, estimate in each.items()}
        for metric, each in averages.items()
    }


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")
