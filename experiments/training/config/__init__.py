"""The configuration of a run; each of its parts checks its own values.

Offered: `FinetuneConfig` and its parts, and the names of output directories.
"""

from experiments.training.config.checkpoints import CheckpointConfig, HeldOutConfig
from experiments.training.config.finetune import FinetuneConfig
from experiments.training.config.fit import FitConfig
from experiments.training.config.hub import HubConfig
from experiments.training.config.optimizer import OptimizerConfig
from experiments.training.config.output_names import name_output
from experiments.training.config.share import ShareConfig

__all__ = [
    "CheckpointConfig",
    "FinetuneConfig",
    "FitConfig",
    "HeldOutConfig",
    "HubConfig",
    "OptimizerConfig",
    "ShareConfig",
    "name_output",
]
