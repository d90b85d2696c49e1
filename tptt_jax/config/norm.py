"""The configuration of the norms of a decoder."""

from dataclasses import dataclass
from typing import Literal

from tptt_jax.config.checks import check_choice

Norm = Literal["rms", "layer"]
NormPlacement = Literal["before", "after", "both"]


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """The norms of the residual stream; q/k norms share `eps`, `offset` and `float32`."""

    kind: Norm = "rms"
    """RMS norm, or LayerNorm (which subtracts the mean)."""
    eps: float = 1e-6
    weight: bool = True
    """Multiply by a learned weight."""
    bias: bool = False
    """Add a learned bias."""
    offset: bool = False
    """Multiply by 1 + weight, in float32."""
    float32: bool = False
    """Multiply by the weight in float32, before the cast to the input's dtype."""
    placement: NormPlacement = "before"
    """Norm of each sublayer's input, of its output before the residual addition, or both."""

    def __post_init__(self) -> None:
        """Rejects values that no norm can have."""
        check_choice("norm kind", self.kind, Norm)
        check_choice("norm placement", self.placement, NormPlacement)
        if not 0 <= self.eps < 1:
            raise ValueError(f"norm eps must lie in [0, 1), got {self.eps}.")
