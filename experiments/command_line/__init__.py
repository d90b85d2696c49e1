"""Turns command lines and YAML files into configurations, without knowing any of them.

Offered: running a configured command, reading arguments, and reading and writing YAML.
"""

from experiments.command_line.arguments import parse_arguments, run_configured
from experiments.command_line.yaml_defaults import read_yaml, resolved_yaml, unresolved_defaults

__all__ = ["parse_arguments", "read_yaml", "resolved_yaml", "run_configured", "unresolved_defaults"]
