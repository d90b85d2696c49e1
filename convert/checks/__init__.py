"""`convert verify`: checks that a model gives the original's logits, also split, padded or packed.

Offered: `verify_pretrained`. Only `transformers_logits` needs torch, and is imported on demand.
"""

from convert.checks.verify import verify_pretrained

__all__ = ["verify_pretrained"]
