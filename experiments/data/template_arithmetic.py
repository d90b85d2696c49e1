"""Bounds the arithmetic of chat templates: one operation of C code has no other time limit."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import test_divisibleby

# Far beyond counts, dates and sizes; an operation takes microseconds.
_MAX_BITS = 10_000
_MAX_DIGITS = 1000
_MAX_ITEMS = 1 << 27


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Refuses huge numbers, and texts and lists that are repeated too often."""

    intercepted_binops = frozenset(("*", "**", "/", "//", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters["round"] = _round
        self.tests["divisibleby"] = _is_divisible

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_number(left)
        _check_number(right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        if operator == "*":
            _check_repetition(left, right)
            _check_repetition(right, left)
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def bounded_arithmetic() -> Iterator[None]:
    """Templates that transformers compiles within the context have bounded arithmetic.

    What exceeds the bounds raises TemplateError; every other result is the same.
    """
    from transformers.utils import chat_template_utils

    theirs: Any = chat_template_utils  # its environment is private
    before = theirs.ImmutableSandboxedEnvironment
    theirs.ImmutableSandboxedEnvironment = _BoundedEnvironment
    try:
        yield
    finally:
        theirs.ImmutableSandboxedEnvironment = before


def _check_number(value: Any) -> None:
    if isinstance(value, int):
        _check_bits(value.bit_length())


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise _refusal(f"computes a whole number of more than {_MAX_BITS:,} bits")


def _check_repetition(sequence: Any, times: Any) -> None:
    if not isinstance(times, int) or not isinstance(sequence, str | bytes | list | tuple):
        return
    if len(sequence) * times > _MAX_ITEMS:
        raise _refusal(f"repeats a text or a list {times:,} times")


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    """The filter `round`, which computes powers of ten."""
    _check_number(value)
    if abs(precision) > _MAX_DIGITS:
        raise _refusal(f"rounds to more than {_MAX_DIGITS:,} digits")
    return do_round(value, precision, method)


def _is_divisible(value: Any, num: Any) -> bool:
    _check_number(value)
    _check_number(num)
    return test_divisibleby(value, num)


def _refusal(what: str) -> TemplateError:
    return TemplateError(
        f"the chat template {what}: repair the template, or leave the conversation out."
    )
