"""Reads command lines: flags, which override a YAML file given with --config."""

import contextlib
import functools
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from convert.command_line import join_help_lines, list_options, run_command, usage_sentence
from experiments.command_line.yaml_defaults import (
    config_path,
    read_yaml,
    unresolved_defaults,
)

Config = TypeVar("Config")

_SHARED_FLAGS = "Also takes --json (one JSON object as the last line of stdout) and --debug."


def parse_arguments(argv: Sequence[str], cls: type[Config], *, prog: str | None = None) -> Config:
    """Reads a configuration from flags and, if ``--config`` names one, a YAML file.

    The YAML file holds the flags' names with underscores, in blocks where a flag has a dot
    (``liza: {mag_init: 0.1}``); its values are the defaults, and flags override them.

    Args:
      argv: the arguments after the program's name.
      cls: a dataclass; for ``--config`` it needs a field ``config: Path | None = None``.
      prog: the program's name in ``--help``.

    Returns:
      A validated instance of `cls`.

    Raises:
      FileNotFoundError: if the YAML file does not exist.
      ValueError: if the YAML file or a flag is wrong, in one sentence.
      SystemExit: with status 0 after ``--help``.
    """
    path = config_path(argv)
    values = {} if path is None else _modernized(read_yaml(path))
    default = unresolved_defaults(cls, None, values, where=str(path))
    description = f"{inspect.getdoc(cls)}\n\n{_SHARED_FLAGS}"

    def parse(args: Sequence[str]) -> Config:
        join_help_lines(cls, args)
        return tyro.cli(cls, args=args, default=default, prog=prog, description=description)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse(list(argv))
    except SystemExit as stop:
        if not stop.code:
            raise
        options = functools.partial(list_options, lambda: parse(["--help"]))
        raise ValueError(usage_sentence(complaint.getvalue(), options, argv)) from None


def run_configured(
    function: Callable[[Config], dict[str, Any] | None],
    cls: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """`run_command` for a command that takes a configuration.

    Args:
      function: the command; it returns what --json prints.
      cls: class of the configuration (see `parse_arguments`).
      argv: the arguments; None: those of the process.
      prog: the program's name in ``--help``.

    Returns:
      The exit status.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    shared = [argument for argument in given if argument in ("--json", "--debug")]
    own = [argument for argument in given if argument not in shared]
    return run_command(
        lambda: function(parse_arguments(own, cls, prog=prog)), shared, prog=prog, readable=False
    )


def _modernized(values: dict[str, Any]) -> dict[str, Any]:
    """Converts an older configuration file: remat was true or false."""
    remat = values.get("remat")
    return values | {"remat": "full" if remat else "none"} if isinstance(remat, bool) else values
