"""The update rule of the recurrence: an operator's name, its steps and its gates."""

from dataclasses import dataclass
from typing import Any, Literal

from tptt_jax.config.checks import MAX_RANK, check_at_least, check_at_most, check_choice

Operator = Literal[
    "delta_rule",
    "delta_rule_v",
    "delta_rule_kv",
    "delta_rule_gelu",
    "gated_delta_rule",
    "delta_product",
    "delta_product_r",
    "delta_product_c",
    "gated_delta_product",
    "tptt_reference",
]
Trick = Literal["derivative", "rotary", "combined"]
Gate = Literal["projected", "k", "v", "kv", "constant"]
StateActivation = Literal["none", "gelu"]

# Fields that each of the paper's operators sets, unless the caller gives them.
OPERATORS: dict[str, dict[str, Any]] = {
    "delta_rule": {"num_householder": 1},
    "delta_rule_v": {"num_householder": 1, "beta_gate": "v"},
    "delta_rule_kv": {"num_householder": 1, "beta_gate": "kv"},
    "delta_rule_gelu": {"num_householder": 1, "state_activation": "gelu"},
    "gated_delta_rule": {"num_householder": 1, "alpha_gate": "k"},
    "delta_product": {"num_householder": 2},
    "delta_product_r": {"num_householder": 2, "trick": "rotary"},
    "delta_product_c": {"num_householder": 2, "trick": "combined"},
    "gated_delta_product": {"num_householder": 2, "alpha_gate": "k"},
}
OPERATOR_DEFAULTS: dict[str, Any] = {
    "num_householder": 2,
    "trick": "derivative",
    "beta_gate": "k",
    "alpha_gate": "constant",
    "state_activation": "none",
}


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A resolved update rule: the settings behind an operator's name."""

    num_householder: int
    trick: Trick
    beta_gate: Gate
    alpha_gate: Gate
    state_activation: StateActivation


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How a token changes the state; a part of `LizaConfig`."""

    operator: Operator | None = None
    """Named update rule of the paper; sets the five fields below it. None: gated_delta_rule with
    writes="evicted", else delta_product. "tptt_reference" computes what the package tptt 0.12.1
    does, for adapters that were trained with it (see `LizaConfig.tptt_reference`)."""
    num_householder: int | None = None
    """Householder steps per token (the paper's order n); gated_delta_rule: 1, delta_product: 2."""
    trick: Trick | None = None
    """How a token becomes num_householder virtual tokens; delta_product: derivative."""
    beta_gate: Gate | None = None
    """Input of the write gate. "projected": a learned linear map of the token's keys
    and values, the default with writes="evicted"; "k", "v", "kv": TPTT's causal means; "constant":
    0.5."""
    alpha_gate: Gate | None = None
    """Input of the forget gate, with the same choices; "constant": no decay."""
    state_activation: StateActivation | None = None
    """Non-linearity on the state after every chunk_size tokens (paper eq. 8); its result
    depends on chunk_size; delta_product: none."""
    vector_beta: bool = False
    """One write gate per channel (paper eq. 3) instead of one per head."""
    expand_gates: bool = False
    """Expand the write gate into virtual tokens like k and v, as in the paper's text; a differenced
    gate turns negative and lets the state grow."""

    def _operator_defaults(self) -> dict[str, Any]:
        """The five fields that the operator's name sets, as the paper has them."""
        assert self.operator is not None
        return OPERATOR_DEFAULTS | OPERATORS.get(self.operator, {})

    def _check_rule(self) -> None:
        """Raises ValueError if a choice is unknown or gates exclude each other."""
        check_choice("trick", self.trick, Trick)
        check_choice("beta_gate", self.beta_gate, Gate)
        check_choice("alpha_gate", self.alpha_gate, Gate)
        check_choice("state_activation", self.state_activation, StateActivation)
        check_at_least(self, 1, "num_householder")
        check_at_most(self, MAX_RANK, "num_householder")
        if self.beta_gate == "projected" and (self.vector_beta or self.expand_gates):
            raise ValueError(
                'beta_gate="projected" gives one gate per head and step: leave vector_beta and '
                'expand_gates False, or use beta_gate="k".'
            )

    @property
    def recurrence(self) -> Recurrence:
        """The update rule that `operator` and the five fields below it give."""
        return Recurrence(**{name: getattr(self, name) for name in OPERATOR_DEFAULTS})
