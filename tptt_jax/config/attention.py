"""The configuration of a decoder's softmax attention, without its sizes."""

from dataclasses import dataclass
from typing import Literal

from tptt_jax.config.checks import check_choice, check_positive

QkNorm = Literal["head", "full"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Projections of attention, and what happens to queries, keys and logits."""

    fused_qkv: bool = False
    """One projection qkv_proj gives queries, keys and values side by side; adapters sit on it."""
    bias: bool = False
    """Biases on the q, k and v projections."""
    out_bias: bool = False
    """A bias on the output projection."""
    qk_norm: QkNorm | None = None
    """RMS norm on queries and keys before the rotary embedding: over each head, or over the
    full width of the projection before it is cut into heads."""
    clip_qkv: float | None = None
    """Queries, keys and values of softmax attention are clipped to [-clip_qkv, clip_qkv], after
    any q/k norm."""
    query_scale: float | None = None
    """Factor on the attention logits; None is head_dim ** -0.5."""
    softcap: float | None = None
    """Attention logits are softcap * tanh(logits / softcap); None: unchanged."""

    def __post_init__(self) -> None:
        """Rejects values that no attention can have."""
        if self.qk_norm is not None:
            check_choice("attention qk_norm", self.qk_norm, QkNorm)
        check_positive(self, "clip_qkv", "query_scale", "softcap", part="attention ")
