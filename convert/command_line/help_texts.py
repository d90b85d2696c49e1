"""Help texts of options: the documentation of a parameter or field, its lines joined."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import docstring_parser
from typing_extensions import Doc


def join_help_lines(target: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Gives every parameter or field its documentation as help text, wrapped by the terminal.

    tyro 1.0 keeps the line breaks of indented docstrings, so lines would break where the source
    does and again where the terminal ends. A `Doc` (PEP 727) in each annotation replaces that
    text; nothing else reads it. What was joined before stays as it is.

    Args:
      target: a function, or a dataclass with its bases; dataclasses among the types of its
        parameters or fields are joined, too.
      arguments: of the command line. Without -h or --help nothing is shown, and nothing is done:
        docstrings take a tenth of a second to read.
    """
    if {"-h", "--help"}.intersection(arguments):
        _join(target)


def _join(target: Callable[..., Any]) -> None:
    for each in target.__mro__ if isinstance(target, type) else (target,):
        if not isinstance(each, type) or dataclasses.is_dataclass(each):
            _annotate(each)
    for hint in get_type_hints(target).values():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                _join(part)


def _annotate(target: Callable[..., Any]) -> None:
    hints = inspect.get_annotations(target)
    for parameter in docstring_parser.parse_from_object(target).params:
        name, text = parameter.arg_name, parameter.description
        if text and name in hints and not _has_doc(hints[name]):
            hints[name] = Annotated[hints[name], Doc(" ".join(text.split()))]
    target.__annotations__ = hints


def _has_doc(hint: object) -> bool:
    return any(isinstance(part, Doc) for part in getattr(hint, "__metadata__", ()))
