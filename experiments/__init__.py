"""Thin command lines: fine-tune, generate, evaluate, bench."""
