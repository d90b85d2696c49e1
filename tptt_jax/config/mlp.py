"""The configurations of a decoder's feed-forward sublayers, without their widths."""

from dataclasses import dataclass
from typing import Literal

from tptt_jax.config.checks import check_at_least, check_at_most, check_choice

Activation = Literal["silu", "gelu_tanh"]
_MAX_EXPERTS = 1 << 12


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """One MLP, or each expert if there are several."""

    activation: Activation = "silu"
    """Activation of the MLP, or of its gate if it has one."""
    gated: bool = True
    """down(activation(gate(x)) * up(x)); False: down(activation(up(x)))."""
    bias: bool = False
    """Biases on all projections; experts have none."""

    def __post_init__(self) -> None:
        """Rejects unknown activations."""
        check_choice("mlp activation", self.activation, Activation)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of each MLP."""

    number: int = 0
    """Experts of each layer; a router chooses some for every token; 0: one plain MLP."""
    per_token: int = 0
    """Experts chosen for every token."""
    normalize_weights: bool = False
    """The chosen experts' weights are divided by their sum."""

    def __post_init__(self) -> None:
        """Rejects numbers that do not fit together."""
        check_at_least(self, 0, "number", "per_token", part="experts ")
        check_at_most(self, _MAX_EXPERTS, "number", part="experts ")
        if self.number and not 1 <= self.per_token <= self.number:
            raise ValueError(
                f"experts per_token must lie between 1 and their number ({self.number}), got "
                f"{self.per_token}."
            )
