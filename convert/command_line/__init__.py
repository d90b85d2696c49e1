"""Runs every command of the project: arguments, errors in one line, JSON, exit status.

Offered: `run_command`, and error sentences for arguments that do not parse.
"""

from convert.command_line.running import run_command
from convert.command_line.usage_errors import list_options, usage_sentence

__all__ = ["list_options", "run_command", "usage_sentence"]
