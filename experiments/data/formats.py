"""Turns rows of text, instructions or conversations into examples of tokens."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from experiments.data.answers import mark_answers
from experiments.data.bad_rows import BadRows
from experiments.data.columns import Format
from experiments.data.conversations import (
    Reader,
    read_conversation,
    read_prompt_completion,
    read_question_answer,
)
from experiments.data.marked_text import (
    MarkedText,
    all_targets,
    check_characters,
    marked_examples,
    portions,
)
from experiments.data.packing import Example
from experiments.data.rows import Rows
from experiments.data.sharegpt import read_sharegpt
from experiments.data.special_tokens import begin_tokens, drop_repeated_bos, end_token
from experiments.data.templates import ChatTemplate, FatalTemplateError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

Loss = Literal["answers", "all"]

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca); inference must use the
# same.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

_QUESTION_PROMPT = "Question: {question}\nAnswer:"

_READERS: dict[Format, Reader] = {
    "chat": read_conversation,
    "sharegpt": read_sharegpt,
    "prompt-completion": read_prompt_completion,
    "question-answer": read_question_answer,
}


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of an instruction, with an optional input."""
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return template.format(instruction=instruction, input=context)


def text_documents(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]
) -> list[Int[np.ndarray, " L"]]:
    """Tokens of each text, with an end-of-sequence token but no beginning-of-sequence token."""
    end_id = end_token(tokenizer)
    end = [] if end_id is None else [end_id]
    start = begin_tokens(tokenizer)
    documents = []
    for some in portions(texts):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            ids = drop_repeated_bos(tokenizer, start + ids)[len(start) :]
            ended = ids + end if ids and ids[-1:] != end else ids
            documents.append(np.asarray(ended, dtype=np.int32))
    return documents


def cut_document(
    tokens: Int[np.ndarray, " L"], length: int, prefix: Sequence[int]
) -> list[Example]:
    """Cuts a document into consecutive examples of `length` tokens that begin with `prefix`."""
    room = length - len(prefix)
    if room < 1:
        raise ValueError(
            f"sequence_length = {length} has no room beside the beginning-of-sequence token: "
            "raise --data.sequence-length."
        )
    start = np.asarray(prefix, dtype=np.int32)
    # An empty document stays one example, to be counted among those without targets.
    places = range(0, max(len(tokens), 1), room)
    pieces = (tokens[place : place + room] for place in places)
    return [all_targets(np.concatenate([start, piece])) for piece in pieces]


def row_examples(
    tokenizer: "PreTrainedTokenizerFast",
    rows: Rows,
    found: Format,
    loss: Loss,
    bad: BadRows | None = None,
) -> list[Example]:
    """The example of each row of a table that has prompts and answers.

    Args:
      tokenizer: of the model.
      rows: with the columns of the format.
      found: any format but "text".
      loss: what counts.
      bad: takes the rows that cannot be read; None: they are errors.

    Raises:
      ValueError: if a cell is invalid, or the chat template cannot render a conversation; the
        message names the row.
    """
    bad = bad or BadRows()
    if found not in _READERS or _is_plain(tokenizer, rows, found):
        return _instruction_examples(tokenizer, rows, found, loss, bad)
    return _chat_examples(tokenizer, rows, _READERS[found], loss, bad)


def _is_plain(tokenizer: "PreTrainedTokenizerFast", rows: Rows, found: Format) -> bool:
    """Whether prompts and answers are texts, not turns of a conversation."""
    if found == "question-answer":
        return not tokenizer.chat_template
    return found == "prompt-completion" and not any(
        isinstance(row.get("prompt"), list) for row in rows.rows
    )


def _instruction_examples(
    tokenizer: "PreTrainedTokenizerFast", rows: Rows, found: Format, loss: Loss, bad: BadRows
) -> list[Example]:
    """Prompt, answer and end of sequence of each row."""
    marked = []
    for number, row in enumerate(rows.rows):
        place = rows.place(number)
        read = bad.read(functools.partial(_prompt_and_answer, row, found, place))
        if read is None:
            continue
        prompt, answer = read
        text = prompt + answer
        marked.append(MarkedText(text, [(len(prompt), len(text))]))
    if loss == "all":
        marked = [MarkedText(text, [(0, len(text))]) for text, _ in marked]
    examples = marked_examples(tokenizer, marked, special_tokens=True)
    return [_ended(example, end_token(tokenizer)) for example in examples]


def _prompt_and_answer(row: dict[str, Any], found: Format, place: str) -> tuple[str, str]:
    if found == "prompt-completion":
        return _text_cell(row, "prompt", place), _text_cell(row, "completion", place)
    if found == "question-answer":
        question, answer = (_text_cell(row, name, place) for name in ("question", "answer"))
        return _QUESTION_PROMPT.format(question=question), f" {answer}"
    context = row.get("input")
    prompt = alpaca_prompt(
        _text_cell(row, "instruction", place),
        "" if context is None else _text_cell(row, "input", place),
    )
    return prompt, _text_cell(row, "output", place)


def _chat_examples(
    tokenizer: "PreTrainedTokenizerFast", rows: Rows, read: Reader, loss: Loss, bad: BadRows
) -> list[Example]:
    """Each conversation as the tokenizer's chat template renders it."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{rows.source} holds conversations, but the tokenizer of this model has no chat "
            "template: use an instruction-tuned model, or convert the data to the text format."
        )

    template = ChatTemplate(tokenizer)

    def mark(number: int) -> MarkedText:
        try:
            return mark_answers(template, read(rows.rows[number]), everything=loss == "all")
        except FatalTemplateError as error:
            raise FatalTemplateError(f"{rows.place(number)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{rows.place(number)}: {error}") from error

    found = [bad.read(functools.partial(mark, number)) for number in range(len(rows.rows))]
    marked = [each for each in found if each is not None]
    return list(marked_examples(tokenizer, marked, special_tokens=False))


def text_cells(rows: Rows, column: str, bad: BadRows | None = None) -> list[str]:
    """The texts of one column.

    Args:
      rows: of a table.
      column: its name.
      bad: takes the rows that have no text there; None: they are errors.

    Raises:
      ValueError: if a cell is not text.
    """
    bad = bad or BadRows()
    cells = (
        bad.read(functools.partial(_text_cell, row, column, rows.place(number)))
        for number, row in enumerate(rows.rows)
    )
    return [cell for cell in cells if cell is not None]


def _text_cell(row: dict[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        came = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{place}: {column} must be text, got {came}: repair or remove the row.")
    try:
        return check_characters(value)
    except ValueError as error:
        raise ValueError(f"{place}: {column}: {error}") from None


def _ended(example: Example, end: int | None) -> Example:
    if end is None:
        return example
    tokens, targets = example
    if len(tokens) == 0 or tokens[-1] != end:
        tokens, targets = np.append(tokens, np.int32(end)), np.append(targets, True)
    targets[-1] = True
    return Example(tokens, targets)
