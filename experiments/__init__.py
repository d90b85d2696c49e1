"""Thin command lines: fine-tune, generate, evaluate, bench."""

from experiments.huge_pages import restart_with_huge_pages

restart_with_huge_pages()
