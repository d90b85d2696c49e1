"""Softmax attention: over parts of keys, whole rows, and as one fused kernel.

Rotary embedding (`rope`) and soft caps (`softcap`) are modules of their own.
"""

from tptt_jax.ops.attention.blocks import Attended, KeyValues, attend
from tptt_jax.ops.attention.fused import can_fuse, fused_attention
from tptt_jax.ops.attention.rows import attend_sequence

__all__ = [
    "Attended",
    "KeyValues",
    "attend",
    "attend_sequence",
    "can_fuse",
    "fused_attention",
]
