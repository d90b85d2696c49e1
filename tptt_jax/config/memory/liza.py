"""The configuration of a Titan's memory, made of parts that check themselves."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

from tptt_jax.config.checks import check_choice
from tptt_jax.config.memory.computation import Computation
from tptt_jax.config.memory.implied import fill_implied
from tptt_jax.config.memory.mixing import Mixing
from tptt_jax.config.memory.update_rule import (
    OPERATOR_DEFAULTS,
    OPERATORS,
    Operator,
    UpdateRule,
)
from tptt_jax.config.memory.window import Window
from tptt_jax.config.model import LayerKind

Writes = Literal["evicted", "all", "none"]

# Fields that `writes` sets, unless the caller gives them.
_WRITES_DEFAULTS: dict[str, dict[str, Any]] = {
    "evicted": {
        **{"operator": "gated_delta_rule", "mag": "mass", "linear_scale": "learned"},
        "memory_rank": 16,
    },
    "all": {
        **{"operator": "delta_product", "mag": "learned", "linear_scale": "match"},
        "memory_rank": 0,
    },
    "none": {
        **{"operator": "gated_delta_rule", "mag": "mass", "linear_scale": "learned"},
        "memory_rank": 0,
    },
}


@dataclass(frozen=True, kw_only=True)
class _Writes:
    """Which tokens are written; the first field of `LizaConfig`."""

    writes: Writes = "evicted"
    """"evicted": a token enters the memory when it leaves the window, sinks never do; layers that
    the base model windows itself have no memory. "all": every token, in every layer. "none": there
    is no memory, only a window."""


@dataclass(frozen=True, kw_only=True)
class LizaConfig(Computation, Window, Mixing, UpdateRule, _Writes):
    """The linear-attention memory of a model's layers, and how it is mixed in.

    By default the memory holds the tokens that leave the window of softmax attention
    (docs/memory.md): set `softmax_window`. ``LizaConfig(writes="all")`` is a memory beside the
    softmax, as in TPTT; `paper` gives the paper's own setting.

    Fields that are None are set by `writes` and `operator`:
    ``LizaConfig(operator="delta_rule")`` has one Householder step and
    ``LizaConfig(operator="delta_rule", num_householder=3)`` has three. After construction they
    hold the resolved values. `dataclasses.replace(config, operator=...)` resets the fields that
    still have the old operator's default, even if they were passed explicitly, and keeps all
    others; `with_operator` resets them all.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: it is immutable, and a copy would lose which values were implied."""
        return self

    def __post_init__(self) -> None:
        """Resolves fields that are None and rejects impossible combinations."""
        check_choice("writes", self.writes, Writes)
        fill_implied(self, _WRITES_DEFAULTS[self.writes])
        check_choice("operator", self.operator, Operator)
        fill_implied(self, self._gates_for_writes(self._operator_defaults()))
        self._check_rule()
        self._check_mixing()
        self._check_window()
        self._check_computation()
        self._check_reference()
        self._check_writes()

    def _gates_for_writes(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.writes == "all":
            return values
        # The operator says whether there is a gate; what is best to compute it from is measured.
        gates = {name: values[name] for name in ("beta_gate", "alpha_gate")}
        return values | {n: "projected" if gate == "k" else gate for n, gate in gates.items()}

    def _check_reference(self) -> None:
        projected = "projected" in (self.beta_gate, self.alpha_gate)
        if self.operator == "tptt_reference" and (
            self.vector_beta or self.expand_gates or projected or self.writes != "all"
        ):
            raise ValueError(
                'operator "tptt_reference" has gates of its own kind and writes every token: use '
                'writes="all", and leave vector_beta, expand_gates and the gates alone.'
            )

    def _check_writes(self) -> None:
        if self.horizon is not None and self.writes == "all":
            raise ValueError(
                'horizon counts the tokens that have left the window, and writes="all" has none '
                'of these: leave it out, or use writes="evicted".'
            )
        if not self.softmax:
            if self.writes != "all":
                raise ValueError(
                    "softmax=False has no window from which tokens could be evicted: use "
                    'writes="all".'
                )
            if self.cross_gate:
                raise ValueError("softmax=False leaves nothing to mix with: use cross_gate=False.")
            object.__setattr__(self, "linear_scale", "unit")
        if self.writes == "all":
            for name, value in (("mag", "mass"), ("linear_scale", "learned")):
                if getattr(self, name) == value:
                    raise ValueError(
                        f'{name}="{value}" measures the memory against evicted tokens: use '
                        'writes="evicted".'
                    )
        elif self.cross_gate or self.linear_scale == "projected":
            raise ValueError(
                'cross_gate and linear_scale="projected" mix a memory of every token: use '
                'writes="all".'
            )

    def has_memory(self, kind: LayerKind) -> bool:
        """Whether layers of this kind have a memory; the base model's own windows have none."""
        by_kind = {"full": self.writes != "none", "sliding": self.writes == "all", "kept": False}
        return by_kind[kind]

    def runs_memory(self, kind: LayerKind) -> bool:
        """Whether that memory ever holds tokens."""
        is_idle = self.writes == "evicted" and self.softmax_window is None
        return self.has_memory(kind) and not is_idle

    def with_operator(self, operator: Operator) -> Self:
        """This configuration with another operator and everything that operator sets."""
        return dataclasses.replace(
            self, **dict.fromkeys(OPERATOR_DEFAULTS, None), operator=operator
        )

    @classmethod
    def named(cls, operator: Operator, **changes: Any) -> Self:
        """The default memory with one of the paper's operators.

        Example:
          >>> LizaConfig.named("gated_delta_product", softmax_window=256).num_householder
          2
        """
        return cls(operator=operator, **changes)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """TPTT's own setting: every token, unit scale, one scheduled share (0.01 to 0.5)."""
        settings = {"mag": "scheduled", "mag_init": 0.01, "linear_scale": "unit"}
        return cls(**{"writes": "all", **settings} | changes)

    @classmethod
    def tptt_reference(cls, mode: str = "delta_product", **changes: Any) -> Self:
        """What the package tptt 0.12.1 computes by default in one of its nine operator modes.

        Its settings are called `chunk_size` (max_chunk_size), `mag_init` (mag_weight), `cross_gate`
        and `linear_scale="projected"` (base_scale_attn) here.

        Raises:
          ValueError: if the mode is unknown.
        """
        if mode not in OPERATORS:
            raise ValueError(f"mode must be one of {', '.join(OPERATORS)}, got {mode!r}.")
        package: dict[str, Any] = {"mag": "scheduled", "mag_init": 0.5, "linear_scale": "unit"}
        settings = {"writes": "all", **package} | OPERATORS[mode] | changes
        return cls(**settings, operator="tptt_reference")
