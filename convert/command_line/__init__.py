"""Runs every command of the project: arguments, errors in one line, JSON, exit status.

Offered: `run_command`, help texts, error sentences for arguments that do not parse, sizes for
people, and `plain_json` for what a JSON file cannot hold.
"""

from convert.command_line.help_texts import join_help_lines
from convert.command_line.readable import readable_size
from convert.command_line.running import plain_json, run_command
from convert.command_line.usage_errors import list_options, usage_sentence

__all__ = [
    "join_help_lines",
    "list_options",
    "plain_json",
    "readable_size",
    "run_command",
    "usage_sentence",
]
