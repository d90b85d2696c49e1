"""Resuming a run: its settings and inputs are compared with those of earlier calls.

Offered: `Resumption`; settings by name are in `settings`, hashes of data in `fingerprints`.
"""

from experiments.training.resume.resumption import Resumption

__all__ = ["Resumption"]
