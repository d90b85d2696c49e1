"""Softmax attention: over parts of keys, whole rows, and as one fused kernel.

Rotary embedding (`rope`) and soft caps (`softcap`) are modules of their own.
"""

from tptt_jax.ops.attention.blocks import Attended, KeyValues, attend
from tptt_jax.ops.attention.fused import can_fuse, fused_attention
from tptt_jax.ops.attention.rows import attend_sequence
from tptt_jax.ops.attention.sinks import document_sinks, row_sinks
from tptt_jax.ops.attention.split import attend_split

__all__ = [
    "Attended",
    "KeyValues",
    "attend",
    "attend_sequence",
    "attend_split",
    "can_fuse",
    "document_sinks",
    "fused_attention",
    "row_sinks",
]
