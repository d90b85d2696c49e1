"""The parts of `experiments.finetune`: its stages, their loop, progress and plots.

Offered: `FinetuneConfig`. Modules that need orbax or matplotlib are imported where they are used.
"""

from experiments.training.config import FinetuneConfig

__all__ = ["FinetuneConfig"]
