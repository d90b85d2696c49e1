"""The models of commands: loading, fine-tuned or not; limits of their input; generation.

Offered: loading one with its tokenizer, telling whether a source was tuned, and the option
--revision.
"""

from experiments.models.loading import Loaded, is_tuned, load_model
from experiments.models.revision import apply_revision

__all__ = ["Loaded", "apply_revision", "is_tuned", "load_model"]
