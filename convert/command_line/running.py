"""One way to run every command line of the project: arguments, errors, JSON, exit status."""

import contextlib
import errno
import functools
import io
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convert.command_line.help_texts import join_help_lines
from convert.command_line.readable import print_readable
from convert.command_line.usage_errors import list_options, usage_sentence

Command = Callable[..., dict[str, Any] | None]

_EPILOG = "Also takes --json (one JSON object as the last line of stdout) and --debug (tracebacks)."
_INTERRUPTED = 130
_BAD_INPUT = 2
_FAILED = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(
    function: Command | Mapping[str, Command],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    readable: bool = True,
) -> int:
    """Runs a command, as all commands of the project run.

    A result whose "passed" is False makes the exit status 1: the command worked, and a check
    failed. Bad input (ValueError, OSError, or arguments that do not parse) becomes one line
    ``error: ...`` on stderr and exit status 2. Any other exception is a bug of ours and
    passes through.

    Args:
      function: the command; tyro makes its parameters the options. It returns what --json
        prints, if that is not empty. A mapping makes each entry a subcommand.
      argv: the arguments; None: those of the process.
      prog: the name in the help text, e.g. "python -m convert".
      readable: whether the result is printed, one value per line, without --json; False for
        commands that print their progress themselves.

    Returns:
      The exit status.
    """
    arguments, flags = _take_flags(sys.argv[1:] if argv is None else argv)
    try:
        with _plain_warnings():
            result = _parse(function, arguments, prog)() or {}
        # The JSON line is the last one, so it is written when the work is done.
        if "--json" in flags and result:
            print(json.dumps(plain_json(result), allow_nan=False), flush=True)
        elif readable:
            print_readable(result)
        return _FAILED if result.get("passed") is False else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, OSError) as error:
        if "--debug" in flags:
            traceback.print_exc()
        message = " ".join(_sentence(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return _BAD_INPUT


def _sentence(error: Exception) -> str:
    """An exception's text; an error of the system without its number, a full disk with a remedy."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if error.errno in _NO_ROOM:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}: make room, and give the same command again."
    if error.filename is None:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"no such file: {error.filename}"
    return f"{error.filename}: {error.strerror}"


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints the library's warnings on stderr, once, without the logger's name."""
    logger, handler = logging.getLogger("tptt_jax"), logging.lastResort
    if handler is None:
        yield
        return
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _take_flags(argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """Separates --json and --debug, which may stand anywhere before a bare "--"."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = {argument for argument in argv[:end] if argument in ("--json", "--debug")}
    return [each for each in argv[:end] if each not in flags] + list(argv[end:]), flags


def _parse(
    function: Command | Mapping[str, Command], arguments: list[str], prog: str | None
) -> Callable[[], dict[str, Any] | None]:
    """Binds the arguments; the caller runs the command, whose errors are not usage errors."""

    def parse(arguments: list[str]) -> Callable[[], dict[str, Any] | None]:
        for each in (function,) if callable(function) else function.values():
            join_help_lines(each, arguments)
        if not callable(function):
            bound = {name: _deferred(each) for name, each in function.items()}
            return tyro.extras.subcommand_cli_from_dict(bound, prog=prog, args=arguments)
        return tyro.cli(_deferred(function), prog=prog, args=arguments)

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse(arguments)
    except SystemExit as end:
        if end.code:
            options = functools.partial(list_options, functools.partial(_help, parse, arguments))
            raise ValueError(usage_sentence(stderr.getvalue(), options, arguments)) from None
        raise


def _deferred(function: Command) -> Callable[..., Callable[[], dict[str, Any] | None]]:
    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], dict[str, Any] | None]:
        return functools.partial(function, *args, **kwargs)

    # tyro takes the help text from here: the summary, then the parameters.
    summary, marker, parameters = (function.__doc__ or "").partition("Args:")
    bind.__doc__ = f"{summary.rstrip()}\n\n    {_EPILOG}\n\n    {marker}{parameters}"
    return bind


def _help(parse: Callable[[list[str]], object], arguments: list[str]) -> None:
    """Prints the help of a command, or of the subcommand that the arguments begin with."""
    command = [] if not arguments or arguments[0].startswith("-") else arguments[:1]
    parse([*command, "--help"])


def plain_json(value: Any) -> Any:
    """A value that JSON can hold: NumPy scalars become Python's, NaN and Inf null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: plain_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
