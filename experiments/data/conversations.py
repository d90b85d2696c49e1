"""Conversations in data files: OpenAI's messages, and the tools they may call."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

Reader = Callable[[dict[str, Any]], "Conversation"]
"""Of one row."""


class Conversation(NamedTuple):
    """The input of a chat template.

    Attributes:
      messages: each with role, content (a text, or None beside calls), and any further keys.
      tools: descriptions of functions; None: the row has none.
      answers: indices of the assistant's messages that count in the loss.
      untrained: answers excluded from the loss by "weight": 0.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answers: tuple[int, ...]
    untrained: tuple[int, ...]


def read_conversation(row: dict[str, Any]) -> Conversation:
    """Reads the columns `messages` and, if there is one, `tools`.

    Both may be JSON text instead. A content may be a list of text parts, which are joined, and
    null or absent beside tool calls, which becomes None.

    Args:
      row: of a table.

    Raises:
      ValueError: if it holds no conversation, or content other than text.
    """
    return make_conversation(read_list(row, "messages"), row)


def read_prompt_completion(row: dict[str, Any]) -> Conversation:
    """Reads the columns `prompt` and `completion`, lists of messages; only the latter count."""
    prompt, completion = read_list(row, "prompt"), read_list(row, "completion")
    return make_conversation([*prompt, *completion], row, first=len(prompt))


def read_question_answer(row: dict[str, Any]) -> Conversation:
    """Reads the columns `question` and `answer`, which are texts."""
    turns = {"user": "question", "assistant": "answer"}
    for column in turns.values():
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{column} must be text, got {short(row.get(column))}: repair or remove the row."
            )
    return make_conversation([{"role": r, "content": row[c]} for r, c in turns.items()], row)


def read_list(row: dict[str, Any], column: str) -> list[Any]:
    """A column of messages, or JSON text of them.

    Raises:
      ValueError: if it is neither, or empty.
    """
    messages = _parsed(row, column)
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{column} must be a list of role and content, got {short(messages)}: repair or "
            "remove the row."
        )
    return messages


def make_conversation(messages: list[Any], row: dict[str, Any], first: int = 0) -> Conversation:
    """Checks messages, and reads the column `tools`, or else `functions`, if there is one.

    Args:
      messages: with role and content.
      row: their row.
      first: index of the first message that may count in the loss.

    Raises:
      ValueError: if it holds no conversation, or something else than text.
    """
    tools = _parsed(row, "tools") or _functions(row)
    if not _is_objects(tools or []):
        raise ValueError(
            f"tools must be a list of objects, got {short(tools)}: repair or remove the row."
        )
    answers = [i for i, m in enumerate(messages) if _role(m) == "assistant" and i >= first]
    return Conversation(
        messages=[_message(message) for message in messages],
        tools=tools or None,
        answers=tuple(answers),
        untrained=tuple(i for i in answers if not _weight(messages[i])),
    )


def short(value: Any) -> str:
    """The beginning of a value's repr, for messages."""
    try:
        return f"{value!r:.200}"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


def _parsed(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise ValueError(
            f"{column} must be a list, or JSON text of one, got {short(value)}: repair or "
            "remove the row."
        ) from None


def _functions(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The column `functions`, OpenAI's older name of tools, as tools; None: there is none."""
    functions = row.get("functions")
    if not functions or not _is_objects(functions) or not all("name" in f for f in functions):
        return None
    return [{"type": "function", "function": function} for function in functions]


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise ValueError(
            f"every message needs role and content, got {short(message)}: repair or remove the row."
        )
    return role


def _weight(message: dict[str, Any]) -> bool:
    """Whether an answer counts in the loss, by OpenAI's key."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(
            f"the weight of a message must be 0 or 1, got {short(weight)}: repair or "
            "remove the row."
        )
    return weight != 0


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as templates expect it: without nulls and without its weight."""
    kept = {key: value for key, value in message.items() if value is not None and key != "weight"}
    return kept | {"content": _content(message)}


def _content(message: dict[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls") or message.get("function_call"):
            return None  # some templates write calls only then
        raise ValueError(
            "every message needs role and content (content may be null beside tool_calls only), "
            f"got {short(message)}: repair or remove the row."
        )
    if isinstance(content, list):
        return "".join(map(_part, content))
    raise ValueError(
        f"content must be text or a list of text parts, got {short(content)}: repair or "
        "remove the row."
    )


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise ValueError(
            f"content must be text or a list of text parts, got a part of type {short(kind)}: "
            "remove such rows; the model reads text only."
        )
    return text
