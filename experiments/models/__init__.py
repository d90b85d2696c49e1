"""Models that commands run: loaded, fine-tuned or not; what they can read; how they write.

Offered: loading one with its tokenizer, and telling whether a source was tuned.
"""

from experiments.models.loading import Loaded, is_tuned, load_model

__all__ = ["Loaded", "is_tuned", "load_model"]
