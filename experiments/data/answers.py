"""Finds the answers of a conversation in the text that a chat template renders."""

import json
from collections.abc import Iterable
from typing import Any

from experiments.data.conversations import Conversation
from experiments.data.marked_text import MarkedText, check_characters
from experiments.data.templates import ChatTemplate, FatalTemplateError

# Private-use characters: they have no meaning in any text.
_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]


def mark_answers(template: ChatTemplate, chat: Conversation, *, everything: bool) -> MarkedText:
    """Renders a conversation and marks its answers as targets of the loss.

    An answer extends from the generation prompt to the beginning of the next turn. If the template
    marks answers itself, with {% generation %}, these marks are used.

    Args:
      template: renders the text.
      chat: the conversation.
      everything: all turns count in the loss, except answers of weight 0.

    Raises:
      ValueError: if the template refuses the conversation or rewrites an answer.
    """
    chat = _with_contents(template, chat)
    text, spans = template.render_marked(chat.messages, chat.tools)
    check_characters(text)
    finder = _Finder(template, chat, text, everything=everything)
    if everything:
        finder.render_prefixes(chat.untrained)
        targets, start = [], 0
        for first, end in map(finder.find, chat.untrained):
            targets.append((start, first))
            start = end
        return MarkedText(text, [*targets, (start, len(text))])
    trained = [index for index in chat.answers if index not in chat.untrained]
    if spans is None:
        finder.render_prefixes(trained)
        return MarkedText(text, [finder.find(index) for index in trained])
    every = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    silent = [finder.find(index) for index in every if index not in trained]
    kept = [span for span in spans if not any(_overlap(span, other) for other in silent)]
    return MarkedText(text, kept)


def _with_contents(template: ChatTemplate, chat: Conversation) -> Conversation:
    """Replaces a content of None by "" where the template cannot handle None.

    Some templates write calls only if the content is none, others fail on it or write "None".
    """
    if all(message["content"] is not None for message in chat.messages):
        return chat
    empty = chat._replace(messages=[m | {"content": m["content"] or ""} for m in chat.messages])
    texts = []
    for messages in (chat.messages, empty.messages):
        # Remove the word from messages and calls; a remaining "None" is the template's.
        plain = json.loads(json.dumps(messages, default=str).replace("None", "none"))
        try:
            texts.append(template.render(plain, chat.tools))
        except FatalTemplateError:
            raise
        except ValueError:
            texts.append(None)
    with_none, with_empty = texts
    if with_none is None:
        return empty
    is_written = with_empty is not None and with_none.count("None") > with_empty.count("None")
    return empty if is_written else chat


class _Finder:
    def __init__(
        self, template: ChatTemplate, chat: Conversation, text: str, *, everything: bool
    ) -> None:
        self._template, self._chat, self._text = template, chat, text
        self._everything = everything
        self._prefixes: dict[tuple[int, bool], str | None] = {}

    def render_prefixes(self, indices: Iterable[int]) -> None:
        """Renders all prefixes that `find` needs at once, which is faster."""
        needed = [key for index in indices for key in ((index, True), (index + 1, False)) if key[0]]
        messages = self._chat.messages
        prefixes = [(messages[:count], ask) for count, ask in needed]
        texts = self._template.render_each(prefixes, self._chat.tools) if needed else []
        self._prefixes = dict(zip(needed, texts, strict=True))

    def find(self, index: int) -> tuple[int, int]:
        """Start and end of the answer with this index among the messages."""
        before = self._prefix(index, ask=True) if index else None
        through = self._prefix(index + 1)
        if (
            before is not None
            and through is not None
            and self._text.startswith(through)
            and through.startswith(before)
        ):
            return len(before), len(through)
        if self._chat.messages[index]["content"] is None and through is not None:
            start = self._start_of_text(index)
            if start is not None and self._text.startswith(through):
                return start, len(through)
        # Some templates render turns by their place: only the last answer keeps its reasoning.
        found = self._content(self._text, index, len(self._chat.messages))
        if found is None:
            remedy = (
                "remove the weight 0, or use" if self._everything else "use --data.loss all, or"
            )
            roles = [message["role"] for message in self._chat.messages[: index + 1]]
            raise ValueError(
                "the chat template rewrites earlier turns, so that answer "
                f"{roles.count('assistant')} cannot be found in the text: {remedy} conversations "
                "with one answer."
            )
        start, end = found
        if before is not None and len(before) <= start and self._text.startswith(before):
            start = len(before)
        return start, end + len(self._ending(through, index, end))

    def _start_of_text(self, index: int) -> int | None:
        """Start of an answer that consists of calls only, as if it were text."""
        mark = next(char for char in _PRIVATE if char not in self._text)
        plain = {"role": "assistant", "content": mark}
        shown = (self._render([*self._chat.messages[:index], plain]) or "").partition(mark)
        return len(shown[0]) if shown[1] and self._text.startswith(shown[0]) else None

    def _ending(self, through: str | None, index: int, end: int) -> str:
        """The text that ends the turn: it follows the answer here and where it is the last."""
        if through is None or (last := self._content(through, index, index + 1)) is None:
            return ""
        return self._text[end : end + _same(through[last[1] :], self._text[end:])]

    def _content(self, text: str, index: int, count: int) -> tuple[int, int] | None:
        """Start and end of a message's content, found by replacing it with another content."""
        messages = self._chat.messages[:count]
        mark = next(char for char in _PRIVATE if char not in text)
        content = messages[index]["content"] or ""
        messages[index] = messages[index] | {"content": mark}
        other = self._render(messages)
        if other is None or mark not in other:
            return None
        start = _same(text, other)
        same = _same(text[start:][::-1], other[start:][::-1])
        found = text[start : len(text) - same].strip()
        if found not in content or (content.strip() and not found):
            return None
        return start, len(text) - same

    def _prefix(self, count: int, *, ask: bool = False) -> str | None:
        if (count, ask) in self._prefixes:
            return self._prefixes[count, ask]
        return self._render(self._chat.messages[:count], ask=ask)

    def _render(self, messages: list[dict[str, Any]], *, ask: bool = False) -> str | None:
        """Renders some messages; None if the template needs a whole conversation."""
        try:
            return self._template.render(messages, self._chat.tools, ask=ask)
        except FatalTemplateError:
            raise
        except ValueError:
            return None


def _same(one: str, other: str) -> int:
    """Length of the common prefix, in characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
