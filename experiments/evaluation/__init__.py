"""Evaluation tasks: how good a model is, and what its memory contributes.

Nothing is offered here: `experiments.evaluate` imports the tasks, one module each.
"""
