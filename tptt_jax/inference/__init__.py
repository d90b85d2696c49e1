"""Sampling and generation.

Nothing is offered here: `tptt_jax` offers `generate`, `read` and saved states.
"""
