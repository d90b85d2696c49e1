"""Chat templates, which are programs that come with a model: run with bounds on time and memory."""

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from jinja2 import TemplateError

from experiments.data.template_arithmetic import bounded_arithmetic
from experiments.process.memory_limit import limited_memory

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

_SECONDS = 20.0
# A long conversation takes a few times its own size.
_GIGABYTES = 1.0
_MAX_CHARACTERS = 1 << 27
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class OverdueTemplateError(ValueError):
    """A template has exceeded its time limit; other calls would do so too."""


class Rendered(NamedTuple):
    """A conversation as a template renders it.

    Attributes:
      text: the whole text.
      answers: (start, end) of the parts marked as generated; None: the template has no marks.
    """

    text: str
    answers: list[tuple[int, int]] | None


class ChatTemplate:
    """The template of a tokenizer; a context manager, whose thread watches the time.

    Any exception of a template becomes a ValueError of one line.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Takes a tokenizer that has a template."""
        self._tokenizer = tokenizer
        self._began: float | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.get_ident()

    def __enter__(self) -> "ChatTemplate":
        """Starts watching the calls of this thread."""
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops watching."""
        self._done.set()

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
        if any(message["content"] is None for message in messages):
            # `apply_chat_template` would omit the key, which a template does not see as none.
            return self._render(self._source(tools), messages, tools, ask=ask)[0][0]
        apply: Any = self._tokenizer.apply_chat_template
        text = self._limited(
            lambda: str(
                apply(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=ask,
                    continue_final_message=go_on,
                )
            )
        )
        return _checked(text)

    def render_marked(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> Rendered:
        """Renders a conversation with the template's own marks of the assistant's text.

        Raises:
          ValueError: as `render`.
        """
        template = self._source(tools)
        if not _GENERATION.search(template):
            return Rendered(self.render(messages, tools), None)
        texts, spans = self._render(template, messages, tools, marks=True)
        return Rendered(texts[0], [(start, end) for start, end in spans[0]])

    def _source(self, tools: list[dict[str, Any]] | None) -> str:
        return self._limited(lambda: self._tokenizer.get_chat_template(None, cast(Any, tools)))

    def _render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        ask: bool = False,
        marks: bool = False,
    ) -> tuple[list[str], Any]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        texts, spans = self._limited(
            lambda: render(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        )
        return list(map(_checked, texts)), spans

    def _limited(self, function: Callable[[], T]) -> T:
        try:
            with _bounded_memory(), bounded_arithmetic():
                try:
                    self._set(time.monotonic())
                    return function()
                finally:
                    # Once this has the lock, the watch raises no more.
                    self._set(None)
        except _OverdueError:
            raise OverdueTemplateError(
                f"the chat template did not finish in {_SECONDS:g} seconds: repair the template, "
                "or leave the conversation out."
            ) from None
        except MemoryError:
            raise ValueError(
                f"the chat template asks for more than {_GIGABYTES:g} GiB of memory: mend the "
                "template, or leave the conversation out."
            ) from None
        except TemplateError as error:  # what its author has foreseen
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"the chat template fails ({reason:.200}): repair the template, or leave the "
                "conversation out."
            ) from None

    def _set(self, began: float | None) -> None:
        with self._lock:
            self._began = began

    def _watch(self) -> None:
        while not self._done.wait(min(0.25, _SECONDS / 4)):
            with self._lock:
                began = self._began
                if began is not None and time.monotonic() - began > _SECONDS:
                    self._began = None
                    _raise_in(self._thread)


def _bounded_memory() -> contextlib.AbstractContextManager[None]:
    """The bound is one of the whole process: in a thread, it would also be that of the step."""
    if threading.current_thread() is threading.main_thread():
        return limited_memory(int(_GIGABYTES * 2**30))
    return contextlib.nullcontext()


def _checked(text: str) -> str:
    """The text itself; raises ValueError if it would take the tokenizer minutes."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(
            f"the chat template writes {len(text):,} characters, at most {_MAX_CHARACTERS:,} are "
            "possible: repair the template, or leave the conversation out."
        )
    return text


class _OverdueError(Exception):
    """Raised inside a template that takes too long."""


def _raise_in(thread: int) -> None:
    """Raises in another thread: Python's only way to end a foreign loop in any thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(_OverdueError)
    )
