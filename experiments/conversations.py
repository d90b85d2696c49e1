"""Conversations as data files hold them: OpenAI's messages, and the tools they may call."""

import json
from typing import Any, NamedTuple


class Conversation(NamedTuple):
    """What a chat template writes out.

    Attributes:
      messages: each with role and content, a text, and what else it has.
      tools: descriptions of functions; None: the row has none.
      answers: indices of the assistant's messages.
      untrained: those of them that do not count in the loss ("weight": 0).
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answers: tuple[int, ...]
    untrained: tuple[int, ...]


def read_conversation(row: dict[str, Any]) -> Conversation:
    """Reads the columns `messages` and, if there is one, `tools`.

    Both may be JSON text instead. A content may be a list of text parts, which are joined, and
    null or absent beside tool calls, which becomes "".

    Args:
      row: of a table.

    Raises:
      ValueError: if it holds no conversation, or something else than text.
    """
    messages, tools = _parsed(row, "messages"), _parsed(row, "tools")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of role and content, got {messages!r:.200}.")
    if not _is_objects(tools or []):
        raise ValueError(f"tools must be a list of objects, got {tools!r:.200}.")
    answers = [i for i, m in enumerate(messages) if _role(m) == "assistant"]
    return Conversation(
        messages=[_message(message) for message in messages],
        tools=tools or None,
        answers=tuple(answers),
        untrained=tuple(i for i in answers if not _weight(messages[i])),
    )


def _parsed(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise ValueError(
            f"{column} must be a list, or JSON text of one, got {value!r:.200}."
        ) from None


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise ValueError(f"every message needs role and content, got {message!r:.200}.")
    return role


def _weight(message: dict[str, Any]) -> bool:
    """Whether an answer counts in the loss, by OpenAI's key."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"the weight of a message must be 0 or 1, got {weight!r:.200}.")
    return weight != 0


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as templates expect it: without nulls and without its weight."""
    kept = {key: value for key, value in message.items() if value is not None and key != "weight"}
    return kept | {"content": _content(message)}


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls") or message.get("function_call"):
            return ""
        raise ValueError(
            "every message needs role and content (content may be null beside tool_calls only), "
            f"got {message!r:.200}."
        )
    if isinstance(content, list):
        return "".join(map(_part, content))
    raise ValueError(f"content must be text or a list of text parts, got {content!r:.200}.")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise ValueError(
            f"content must be text or a list of text parts, got a part of type {kind!r:.200}: "
            "remove such rows, as this model reads text only."
        )
    return text
