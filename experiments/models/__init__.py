"""The models of commands: loading, fine-tuned or not; limits of their input; generation.

Offered: loading a model with its tokenizer, and telling whether a source was tuned.
"""

from experiments.models.loading import Loaded, is_tuned, load_model

__all__ = ["Loaded", "is_tuned", "load_model"]
