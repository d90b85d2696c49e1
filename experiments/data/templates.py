"""Chat templates, which are programs that come with a model: run with bounds on time and memory."""

import atexit
import contextlib
import re
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.data.template_process import EndedError, TemplateProcess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SECONDS = 20.0
# A long conversation takes a few times its own size.
_GIGABYTES = 1.0
# More would take the tokenizer minutes.
_MAX_CHARACTERS = 1 << 27
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "repair the template, or leave the conversation out."
_PROCESS = TemplateProcess()
atexit.register(_PROCESS.close)


class TemplateFailure(ValueError):
    """A template refuses a conversation, fails, or asks for too much, in one line."""


class FatalTemplateError(TemplateFailure):
    """A template ran out of time or ended its process, or the process cannot be started.

    Other calls would fail in the same way: no row is to blame.
    """


class Rendered(NamedTuple):
    """A conversation as a template renders it.

    Attributes:
      text: the whole text.
      answers: (start, end) of the parts marked as generated; None: the template has no marks.
    """

    text: str
    answers: list[tuple[int, int]] | None


class ChatTemplate:
    """The template of a tokenizer, rendered by transformers in another process.

    Any exception of a template becomes a ValueError of one line.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Takes a tokenizer that has a template."""
        self._tokenizer = tokenizer

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        ask: bool = False,
        go_on: bool = False,
    ) -> str:
        """Renders a conversation.

        Args:
          messages: with role and content; a content of None reaches the template.
          tools: descriptions of functions.
          ask: end with what begins an answer.
          go_on: end with the last message's own last word, which is to be continued.

        Raises:
          ValueError: if the template refuses it, fails, runs too long or asks for too much memory.
        """
        arguments = self._arguments(messages, tools, ask=ask, go_on=go_on)
        return _text(_replies([arguments])[0])

    def render_each(
        self,
        prefixes: list[tuple[list[dict[str, Any]], bool]],
        tools: list[dict[str, Any]] | None = None,
    ) -> list[str | None]:
        """Renders the beginnings of a conversation, in the time of one.

        Args:
          prefixes: messages, and whether to end with what begins an answer.
          tools: descriptions of functions.

        Returns:
          Each text; None: the template cannot render it.

        Raises:
          FatalTemplateError: if the template runs too long or ends its process, or that cannot be
            started.
        """
        arguments: list[dict[str, Any] | None] = []
        for messages, ask in prefixes:
            try:
                arguments.append(self._arguments(messages, tools, ask=ask))
            except TemplateFailure:
                arguments.append(None)
        replies = iter(_replies([each for each in arguments if each is not None]))
        return [None if each is None else next(replies).get("text") for each in arguments]

    def render_marked(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> Rendered:
        """Renders a conversation with the template's own marks of the assistant's text.

        Raises:
          ValueError: as `render`.
        """
        if not _GENERATION.search(self._source(tools)):
            return Rendered(self.render(messages, tools), None)
        marked = self._plain(messages, tools) | {"return_assistant_tokens_mask": True}
        (reply,) = _replies([marked])
        return Rendered(_text(reply), [(start, end) for start, end in reply["spans"] or ()])

    def _source(self, tools: list[dict[str, Any]] | None) -> str:
        source: Any = self._tokenizer.get_chat_template
        with _in_one_line():
            return source(None, tools)

    def _plain(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        """Arguments of `render_jinja_template` that keep a content of None."""
        return {
            "conversations": [messages],
            "tools": tools,
            "chat_template": self._source(tools),
            **self._tokenizer.special_tokens_map,
        }

    def _arguments(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        ask: bool = False,
        go_on: bool = False,
    ) -> dict[str, Any]:
        """Arguments that `apply_chat_template` hands to `render_jinja_template`."""
        if any(message["content"] is None for message in messages):
            # `apply_chat_template` would omit the key, which a template does not see as none.
            return self._plain(messages, tools) | {"add_generation_prompt": ask}
        apply: Any = self._tokenizer.apply_chat_template
        with _in_one_line(), _intercepted_arguments() as found:
            apply(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=ask,
                continue_final_message=go_on,
            )
        return found


@contextlib.contextmanager
def _intercepted_arguments() -> Iterator[dict[str, Any]]:
    """Yields a dict that gets the arguments with which tokenizers would render a template."""
    from transformers import tokenization_utils_base

    theirs: Any = tokenization_utils_base
    before = theirs.render_jinja_template
    found: dict[str, Any] = {}

    def render(**arguments: Any) -> tuple[list[str], list[Any]]:
        found.update(arguments)
        return [""], []

    theirs.render_jinja_template = render
    try:
        yield found
    finally:
        theirs.render_jinja_template = before


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except TemplateFailure:
        raise
    except Exception as error:
        raise _failure(f"{type(error).__name__}: {error}") from None


def _failure(reason: str) -> TemplateFailure:
    reason = " ".join(reason.split())
    return TemplateFailure(f"the chat template fails ({reason:.200}): {_REMEDY}")


def _replies(arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the other process renders, or its errors.

    Args:
      arguments: of transformers' `render_jinja_template`, for each text.

    Raises:
      FatalTemplateError: if the process ends, or cannot be started.
    """
    request = {
        "arguments": arguments,
        "seconds": _SECONDS,
        "bytes": int(_GIGABYTES * 1e9),
        "characters": _MAX_CHARACTERS,
    }
    try:
        return _PROCESS.ask(request)
    except EndedError as error:
        raise FatalTemplateError(f"{_cause_of_end(*error.args)}: {_REMEDY}") from None
    except OSError as error:
        raise FatalTemplateError(
            f"the process that renders chat templates cannot be started ({error}): free some "
            "memory, or end other processes."
        ) from None


def _text(reply: dict[str, Any]) -> str:
    """The text of a reply; raises TemplateFailure if it is an error."""
    if "error" not in reply:
        return reply["text"]
    message = reply["message"]
    match reply["error"]:
        case "refusal":
            raise TemplateFailure(message)
        case "memory":
            problem = f"asks for more than {_GIGABYTES:g} GB of memory"
        case "length":
            problem = f"writes {message} characters, at most {_MAX_CHARACTERS:,} are possible"
        case _:
            raise _failure(message)
    raise TemplateFailure(f"the chat template {problem}: {_REMEDY}")


def _cause_of_end(status: int) -> str:
    if status == -signal.SIGALRM:
        return f"the chat template did not finish in {_SECONDS:g} seconds"
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the chat template ended the process that renders it ({how})"
