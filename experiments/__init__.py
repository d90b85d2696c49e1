"""Thin command lines: fine-tune, generate, evaluate, bench."""

import sys

from experiments.garbage import collect_seldom
from experiments.huge_pages import restart_with_huge_pages
from experiments.interrupts import exit_on_interrupt

# Python is looking for the module that `python -m` names: a command starts, nobody imports.
if sys.argv[:1] == ["-m"]:
    exit_on_interrupt()
    restart_with_huge_pages()
    collect_seldom()
