"""Questions of MMLU (arXiv:2009.03300) from local files or the Hugging Face Hub."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.rows import load_rows

HUB_NAME = "cais/mmlu"
_SPLITS = ("dev", "test")
_FIELDS = ("subject", "question", "choices", "answer")


@dataclass(frozen=True, kw_only=True)
class MmluConfig:
    """Questions of --task mmlu."""

    data: tuple[str, ...] = (HUB_NAME,)
    """"cais/mmlu" from the Hugging Face Hub, a directory, or files of JSON Lines with the fields
    subject, question, choices and answer (an index). Names of files end with "test" or "dev"."""
    limit: int | None = None
    """Number of questions, evenly over the subjects; None: all."""
    batch_size: int = 8
    """Questions at a time."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        if not self.data:
            raise ValueError("mmlu.data must name a directory, files, or cais/mmlu.")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mmlu.{name} must be at least 1, got {value}.")


class Question(NamedTuple):
    """A question of some subject.

    Attributes:
      subject: e.g. "high_school_physics".
      question: its text.
      choices: possible answers, named by letters from A on.
      answer: index of the right one.
    """

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """The letter of the right answer."""
        return string.ascii_uppercase[self.answer]

    @property
    def text(self) -> str:
        """The question with its choices, up to the answer's letter."""
        letters = zip(string.ascii_uppercase, self.choices, strict=False)
        choices = (f"{letter}. {choice}" for letter, choice in letters)
        return "\n".join([f"Question: {self.question}", *choices, "Answer:"])


def one_shot_prompt(question: Question, example: Question) -> str:
    """A question after an answered one of its subject, in LightEval's format."""
    return (
        "The following are multiple choice questions (with answers) about "
        f"{question.subject.replace('_', ' ')}.\n\n"
        f"{example.text} {example.letter}\n\n{question.text}"
    )


def load_questions(data: Sequence[str]) -> tuple[list[Question], dict[str, Question]]:
    """Reads the questions, and for each subject the first of its examples.

    Args:
      data: see `MmluConfig.data`.

    Raises:
      FileNotFoundError: if a file, a directory or the Hub's data set does not exist.
      ValueError: if a row is not a question, or a subject has no example.
    """
    read: dict[str, list[Question]] = {split: [] for split in _SPLITS}
    for path in data:
        for split, source, rows in _read(path):
            read[split] += [_question(row, f"{source}, row {i}") for i, row in enumerate(rows, 1)]
    for split in _SPLITS:
        if not read[split]:
            raise ValueError(
                f"{', '.join(data)} has no {split} questions: MMLU needs a file whose name ends "
                f"with {split}, e.g. mmlu_{split}.jsonl."
            )
    examples: dict[str, Question] = {}
    for example in read["dev"]:
        examples.setdefault(example.subject, example)
    lacking = sorted({question.subject for question in read["test"]} - examples.keys())
    if lacking:
        raise ValueError(
            f"no dev question is about {', '.join(lacking)}: each subject needs one as an example."
        )
    return read["test"], examples


def choose_evenly(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first questions of each subject, as many of each as `limit` allows, in order."""
    seen: dict[str, int] = {}
    turns = []
    for index, question in enumerate(questions):
        turn = seen[question.subject] = seen.get(question.subject, 0) + 1
        turns.append((turn, index))
    return [questions[index] for _, index in sorted(sorted(turns)[:limit], key=lambda x: x[1])]


def _read(path: str) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Split, name and rows of every file of a path."""
    if path == HUB_NAME:
        return [(split, path, _read_hub(split)) for split in _SPLITS]
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"no such file or directory: {path}; check --mmlu.data.")
    files = [place] if place.is_file() else sorted(place.glob("*.jsonl"))
    splits = {file: next((s for s in _SPLITS if file.stem.endswith(s)), None) for file in files}
    if place.is_file() and splits[place] is None:
        raise ValueError(
            f"{path} may hold examples or questions: give it a name that ends with dev or test."
        )
    return [
        (split, str(file), load_rows(str(file)).rows)
        for file, split in splits.items()
        if split is not None
    ]


def _read_hub(split: str) -> list[dict[str, Any]]:
    import datasets  # takes seconds to import
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(HUB_NAME, "all", split=split).to_list()
    except (DatasetNotFoundError, ConnectionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{HUB_NAME} could not be fetched from the Hugging Face Hub ({reason}): give local "
            "files with --mmlu.data."
        ) from error


def _question(row: dict[str, Any], place: str) -> Question:
    missing = [name for name in _FIELDS if row.get(name) is None]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: it needs {', '.join(_FIELDS)}.")
    subject, question, choices, answer = (row[name] for name in _FIELDS)
    letters = len(string.ascii_uppercase)
    if not isinstance(choices, list) or not 2 <= len(choices) <= letters:
        raise ValueError(f"{place}: choices must be a list of 2 to {letters} answers.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{place}: answer must be an index from 0 to {len(choices) - 1}, got {answer!r}."
        )
    return Question(str(subject), str(question), tuple(map(str, choices)), answer)
