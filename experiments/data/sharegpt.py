"""Conversations in ShareGPT's format: `from` and `value` instead of role and content."""

import json
from typing import Any

from experiments.data.conversations import Conversation, make_conversation, read_list, short

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_CALLS = ("function_call", "tool_call")


def read_sharegpt(row: dict[str, Any]) -> Conversation:
    """Reads the columns `conversations` and, if they are there, `system` and `tools`.

    A message may also have role and content. Function calls are JSON text with name and arguments,
    as in LLaMA-Factory.

    Raises:
      ValueError: if it holds no conversation, or content other than text.
    """
    messages = [_message(message) for message in read_list(row, "conversations")]
    system = row.get("system")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return make_conversation(messages, row)


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        raise ValueError(
            f"every message needs from and value, got {short(message)}: repair or remove the row."
        )
    role, content = message.get("from", message.get("role")), message.get("value")
    if content is None:
        content = message.get("content")
    kept = {key: value for key, value in message.items() if key not in ("from", "value")}
    if role in _CALLS:
        return kept | {"role": "assistant", "content": None, "tool_calls": [_call(content)]}
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"from must be one of {', '.join([*_ROLES, *_CALLS])}, got {short(role)}: rename such "
            "roles, or use messages with role and content."
        )
    return kept | {"role": _ROLES[role], "content": content}


def _call(content: Any) -> dict[str, Any]:
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(
            "the value of a function_call must be JSON text with name and arguments, got "
            f"{short(content)}."
        )
    return {"type": "function", "function": call}
