"""What `experiments.finetune` is made of: its stages, their loop, and what people see of them.

Offered: `FinetuneConfig`. Modules that need orbax or plot are imported where they are used.
"""

from experiments.training.config import FinetuneConfig

__all__ = ["FinetuneConfig"]
