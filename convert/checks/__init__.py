"""`convert verify`: whether a model gives the same logits as its original, split, padded or packed.

Offered: `verify_pretrained`. Only `transformers_logits` needs torch, and is imported on demand.
"""

from convert.checks.verify import verify_pretrained

__all__ = ["verify_pretrained"]
