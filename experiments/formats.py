"""Rows of text, instructions or conversations become examples of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError

from experiments.conversations import Conversation, read_conversation
from experiments.packing import Example
from experiments.rows import Rows

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

Format = Literal["text", "alpaca", "chat"]
FormatChoice = Literal["auto", "text", "alpaca", "chat"]
Loss = Literal["answers", "all"]

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), which the model must
# see again at inference.
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

# Offsets are Python tuples: a whole data set of them would not fit in memory.
_TOKENIZE_AT_ONCE = 1000


class MarkedText(NamedTuple):
    """A text and which of its characters count in the loss."""

    text: str
    targets: list[tuple[int, int]]
    """(start, end) of each piece."""


def find_format(rows: Rows, wanted: FormatChoice, text_column: str) -> Format:
    """The format of these rows, recognised by their columns if `wanted` is "auto".

    Raises:
      ValueError: if columns are missing.
    """
    needed: dict[Format, tuple[str, ...]] = {
        "chat": ("messages",),
        "alpaca": ("instruction", "output"),
        "text": (text_column,),
    }
    if wanted == "auto" and text_column != "text":
        wanted = "text"  # whoever names the column of plain text wants it read
    candidates: list[Format] = list(needed) if wanted == "auto" else [wanted]
    for candidate in candidates:
        if all(name in rows.columns for name in needed[candidate]):
            return candidate
    expected = ", or ".join(
        f"{' and '.join(needed[candidate])} (format {candidate})" for candidate in candidates
    )
    raise ValueError(
        f"{rows.source} has the columns {', '.join(rows.columns)}; expected {expected}: rename "
        "them, or name the column of plain text with --data.text-column."
    )


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """What the model sees before it answers an instruction, with an optional input."""
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return template.format(instruction=instruction, input=context)


def text_documents(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]
) -> list[Int[np.ndarray, " L"]]:
    """Tokens of each text, ended by the end-of-sequence token but without one that begins it."""
    end_id = end_token(tokenizer)
    end = [] if end_id is None else [end_id]
    start = begin_tokens(tokenizer)
    documents = []
    for some in _portions(texts):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            ids = begin_once(tokenizer, start + ids)[len(start) :]
            ended = ids + end if ids and ids[-1:] != end else ids
            documents.append(np.asarray(ended, dtype=np.int32))
    return documents


def cut_document(
    tokens: Int[np.ndarray, " L"], length: int, prefix: Sequence[int]
) -> list[Example]:
    """Cuts a document into consecutive examples of `length` tokens, each begun by `prefix`."""
    room = length - len(prefix)
    if room < 1:
        raise ValueError(
            f"sequence_length = {length} leaves no room beside the beginning-of-sequence token: "
            "raise --data.sequence-length."
        )
    start = np.asarray(prefix, dtype=np.int32)
    # An empty document stays one example, so that it is counted among those without targets.
    places = range(0, max(len(tokens), 1), room)
    pieces = (tokens[place : place + room] for place in places)
    return [_all_targets(np.concatenate([start, piece])) for piece in pieces]


def begin_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    begin = cast("int | None", tokenizer.bos_token_id)  # wider types come from a common base
    return [begin] if begin is not None and tokenizer("a")["input_ids"][0] == begin else []


def begin_once(tokenizer: "PreTrainedTokenizerFast", tokens: list[int]) -> list[int]:
    """The same tokens, with one beginning-of-sequence token where they begin with several.

    A rendered chat brings its own, and the tokenizer or the template puts another before it.
    """
    begin = tokenizer.bos_token_id
    count = next((i for i, token in enumerate(tokens) if token != begin), len(tokens))
    return tokens[max(count - 1, 0) :]


def end_token(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The end-of-sequence token, if the tokenizer has one."""
    return cast("int | None", tokenizer.eos_token_id)


def instruction_examples(
    tokenizer: "PreTrainedTokenizerFast", rows: Rows, loss: Loss
) -> list[Example]:
    """Prompt, answer and end of sequence of each Alpaca row.

    Raises:
      ValueError: if a cell is not text.
    """
    marked = []
    for number, row in enumerate(rows.rows, start=1):
        place = f"{rows.source}, row {number}"
        context = row.get("input")
        prompt = alpaca_prompt(
            _text_cell(row, "instruction", place),
            "" if context is None else _text_cell(row, "input", place),
        )
        text = prompt + _text_cell(row, "output", place)
        marked.append(MarkedText(text, [(len(prompt), len(text))]))
    if loss == "all":
        marked = [MarkedText(text, [(0, len(text))]) for text, _ in marked]
    examples = _marked_examples(tokenizer, marked, special_tokens=True)
    return [_ended(example, end_token(tokenizer)) for example in examples]


def chat_examples(tokenizer: "PreTrainedTokenizerFast", rows: Rows, loss: Loss) -> list[Example]:
    """Each conversation as the tokenizer's chat template writes it.

    Raises:
      ValueError: if there is no template, if it refuses a conversation, if it writes a
        conversation's beginning differently once it goes on, so that answers cannot be found, or
        if a message holds something else than text.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "Conversations (format chat) need a tokenizer with a chat template and this model has "
            "none: take an instruction-tuned model, or bring the data into the text format."
        )
    marked = []
    for number, row in enumerate(rows.rows, start=1):
        place = f"{rows.source}, row {number}"
        try:
            chat = read_conversation(row)
            marked.append(_mark_conversation(tokenizer, chat, loss))
        # TypeError: what a template does to values of a kind that its author did not think of.
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from error
    return list(_marked_examples(tokenizer, marked, special_tokens=False))


def text_cells(rows: Rows, column: str) -> list[str]:
    """The texts of one column.

    Raises:
      ValueError: if a cell is not text.
    """
    return [
        _text_cell(row, column, f"{rows.source}, row {number}")
        for number, row in enumerate(rows.rows, start=1)
    ]


def _text_cell(row: dict[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        came = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{place}: {column} must be text, got {came}.")
    return value


def _mark_conversation(
    tokenizer: "PreTrainedTokenizerFast", chat: Conversation, loss: Loss
) -> MarkedText:
    def render(count: int, *, ask: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                chat.messages[:count],
                tools=cast(Any, chat.tools),
                tokenize=False,
                add_generation_prompt=ask,
            )
        )

    def find(index: int) -> tuple[int, int]:
        before, through = render(index, ask=True) if index else "", render(index + 1)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template rewrites earlier turns, so that answer {index + 1} cannot be "
                "found in the text: use --data.loss all, or conversations with one answer."
            )
        return len(before), len(through)

    text = render(len(chat.messages))
    if loss == "answers":
        trained = [i for i in chat.answers if i not in chat.untrained]
        return MarkedText(text, [find(index) for index in trained])
    targets, start = [], 0
    for before, end in map(find, chat.untrained):
        targets.append((start, before))
        start = end
    return MarkedText(text, [*targets, (start, len(text))])


def _marked_examples(
    tokenizer: "PreTrainedTokenizerFast", marked: Sequence[MarkedText], *, special_tokens: bool
) -> Iterator[Example]:
    """Tokenises whole texts, so that tokens fall as in running text, and finds targets by place."""
    for some in _portions(marked):
        encoded = tokenizer(
            [text for text, _ in some],
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
        places = zip(encoded["input_ids"], encoded["offset_mapping"], some, strict=True)
        for ids, offsets, (text, targets) in places:
            kept = begin_once(tokenizer, ids)
            example = _all_targets(np.asarray(kept, dtype=np.int32))
            if targets != [(0, len(text))]:
                places_of = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
                starts, ends = places_of[len(ids) - len(kept) :].T
                inside = np.zeros(len(kept), dtype=np.bool_)
                for start, end in targets:
                    inside |= (ends > start) & (starts < end) & (ends > starts)
                example = Example(example.tokens, example.targets & inside)
            yield example


def _all_targets(tokens: Int[np.ndarray, " L"]) -> Example:
    return Example(tokens, np.arange(len(tokens)) > 0)


def _ended(example: Example, end: int | None) -> Example:
    if end is None:
        return example
    tokens, targets = example
    if len(tokens) == 0 or tokens[-1] != end:
        tokens, targets = np.append(tokens, np.int32(end)), np.append(targets, True)
    targets[-1] = True
    return Example(tokens, targets)


def _portions(items: Sequence[Any]) -> Iterable[list[Any]]:
    for start in range(0, len(items), _TOKENIZE_AT_ONCE):
        yield list(items[start : start + _TOKENIZE_AT_ONCE])
