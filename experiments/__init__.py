"""Command modules (fine-tune, generate, evaluate, bench, ...), and a package for each subject.

Importing them changes nothing about the process. A command prepares its own in its first line, and
only where it is the program (`process/starting.py`).
"""
