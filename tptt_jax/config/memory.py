"""The configuration of a Titan's memory: writes, gates, and mixing with softmax attention."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

from tptt_jax.config.checks import (
    MAX_RANK,
    check_at_least,
    check_at_most,
    check_choice,
    is_int32,
)
from tptt_jax.config.model import LayerKind, ModelConfig

Writes = Literal["evicted", "all", "none"]
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
Mag = Literal["mass", "learned", "scheduled"]
LinearScale = Literal["learned", "match", "unit", "projected"]
Precision = Literal["auto", "highest", "high", "default"]

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
_OPERATOR_DEFAULTS: dict[str, Any] = {
    "num_householder": 2,
    "trick": "derivative",
    "beta_gate": "k",
    "alpha_gate": "constant",
    "state_activation": "none",
}
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


class _ImpliedText(str):
    """A choice implied by another setting; `dataclasses.replace` resolves it again."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        """Plain text: what `dataclasses.asdict` gives, and files hold."""
        return str(self)


class _ImpliedCount(int):
    """A number implied by another setting; see `_ImpliedText`."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        """A plain number, likewise."""
        return int(self)


def _imply(value: str | int) -> str | int:
    return _ImpliedText(value) if isinstance(value, str) else _ImpliedCount(value)


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A resolved update rule: the settings behind an operator's name."""

    num_householder: int
    trick: Trick
    beta_gate: Gate
    alpha_gate: Gate
    state_activation: Literal["none", "gelu"]


@dataclass(frozen=True, kw_only=True)
class LizaConfig:
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

    writes: Writes = "evicted"
    """"evicted": a token enters the memory when it leaves the window, sinks never do; layers that
    the base model windows itself have no memory. "all": every token, in every layer. "none": there
    is no memory, only a window."""
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
    state_activation: Literal["none", "gelu"] | None = None
    """Non-linearity on the state after every chunk_size tokens (paper eq. 8); the only option
    whose result depends on chunk_size; delta_product: none."""
    vector_beta: bool = False
    """One write gate per channel (paper eq. 3) instead of one per head."""
    expand_gates: bool = False
    """Expand the write gate into virtual tokens like k and v, as in the paper's text; a differenced
    gate turns negative and lets the state grow."""
    mag: Mag | None = None
    """The memory's share of the output. "mass": the estimated softmax mass of the
    evicted tokens over all mass, per head and token; the default with writes="evicted".
    "learned": one logit per head, the default with writes="all"; "scheduled": one value for the
    model, set from outside."""
    mag_init: float = 0.05
    """Initial share, in (0, 1) for "learned", in [0, 1] for "scheduled"."""
    linear_scale: LinearScale | None = None
    """Size of the memory's output. "learned": a factor per head and query; the default with
    writes="evicted". "match": each head gets the RMS of its softmax output; the default with
    writes="all". "unit": the paper's unit RMS; "projected": the reference's base_scale_attn, after
    the projection."""
    cross_gate: bool = False
    """Add the product of both terms to their sum, after the projection."""
    softmax: bool = True
    """False: a purely linear model (share 1, unit scale) without softmax and KV cache; needs
    writes="all"."""
    softmax_window: int | None = None
    """Tokens that softmax attention sees, the current one included; None: all, and a memory of
    evicted tokens is idle."""
    softmax_sinks: int = 4
    """First tokens of a document that stay visible beside a window (arXiv:2309.17453)."""
    horizon: int | None = None
    """With writes="evicted": while the memory holds more tokens than this, it forgets faster: no
    half-life is longer than half of it. A memory that has only met shorter rows keeps too much of
    longer ones. None: the forget gate alone decides."""
    full_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that keep the base model's full softmax attention: they have neither
    a window nor a memory, and their cache holds every token. Sorted after construction."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; the result does not depend on it."""
    precision: Precision = "auto"
    """Precision of the matrix products that read and write the memory of a row: "highest" is
    float32 on every backend; "high" and "default" are faster on a GPU or TPU, with fewer bits (on a
    CPU all three are equal). "auto" is "highest" in a float32 model and "default" in half
    precision. The state, the inverse of each chunk's system and single tokens stay exact."""
    memory_rank: int | None = None
    """Rank of the memory's own low-rank deltas on queries, keys and values; 0: none. None: 16 with
    writes="evicted", else 0."""
    memory_alpha: float = 16.0
    """The deltas are scaled by memory_alpha / memory_rank."""
    dropout: float = 0.0
    """Dropout on the memory's output while training."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: it is immutable, and a copy would lose which values were implied."""
        return self

    def __post_init__(self) -> None:
        """Resolves fields that are None and rejects impossible combinations."""
        check_choice("writes", self.writes, Writes)
        self._fill(_WRITES_DEFAULTS[self.writes])
        check_choice("operator", self.operator, Operator)
        self._fill(self._operator_defaults())
        check_choice("trick", self.trick, Trick)
        check_choice("beta_gate", self.beta_gate, Gate)
        check_choice("alpha_gate", self.alpha_gate, Gate)
        check_choice("mag", self.mag, Mag)
        check_choice("linear_scale", self.linear_scale, LinearScale)
        check_choice("state_activation", self.state_activation, Literal["none", "gelu"])
        check_choice("precision", self.precision, Precision)
        check_at_least(self, 1, "num_householder", "chunk_size", "softmax_window", "horizon")
        check_at_least(self, 0, "softmax_sinks", "memory_rank")
        check_at_most(self, MAX_RANK, "num_householder", "softmax_sinks", "memory_rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        self._check_full_layers()
        self._check_share()
        self._check_operator()
        self._check_writes()

    def _check_full_layers(self) -> None:
        layers = tuple(self.full_layers)
        for layer in layers:
            if not is_int32(layer) or layer < 0:
                raise ValueError(
                    f"full_layers must be numbers of layers, counted from 0, got {layer!r:.99}."
                )
        if len(set(layers)) < len(layers):
            twice = min(layer for layer in layers if layers.count(layer) > 1)
            raise ValueError(f"full_layers names layer {twice} more than once: name it once.")
        object.__setattr__(self, "full_layers", tuple(sorted(layers)))

    def _fill(self, values: dict[str, Any]) -> None:
        """Sets what was left to `writes` or `operator`, or was set so by another one."""
        for name, value in values.items():
            given = getattr(self, name)
            if given is None or given == value or isinstance(given, (_ImpliedText, _ImpliedCount)):
                object.__setattr__(self, name, _imply(value))

    def _operator_defaults(self) -> dict[str, Any]:
        assert self.operator is not None
        values = _OPERATOR_DEFAULTS | OPERATORS.get(self.operator, {})
        if self.writes == "all":
            return values
        # The operator says whether there is a gate; what is best to compute it from is measured.
        gates = {name: values[name] for name in ("beta_gate", "alpha_gate")}
        return values | {n: "projected" if gate == "k" else gate for n, gate in gates.items()}

    def _check_share(self) -> None:
        if self.mag == "learned" and not 0 < self.mag_init < 1:
            raise ValueError(f"mag_init must lie strictly between 0 and 1, got {self.mag_init}.")
        if not 0 <= self.mag_init <= 1:
            raise ValueError(f"mag_init must lie between 0 and 1, got {self.mag_init}.")

    def _check_operator(self) -> None:
        projected = "projected" in (self.beta_gate, self.alpha_gate)
        if self.operator == "tptt_reference" and (
            self.vector_beta or self.expand_gates or projected or self.writes != "all"
        ):
            raise ValueError(
                'operator "tptt_reference" has gates of its own kind and writes every token: use '
                'writes="all", and leave vector_beta, expand_gates and the gates alone.'
            )
        if self.beta_gate == "projected" and (self.vector_beta or self.expand_gates):
            raise ValueError(
                'beta_gate="projected" gives one gate per head and step: leave vector_beta and '
                'expand_gates False, or use beta_gate="k".'
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
            if self.full_layers:
                raise ValueError(
                    "softmax=False leaves no softmax attention to keep in full_layers: use "
                    "softmax=True, with softmax_window=1 for the least of it elsewhere."
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

    @property
    def recurrence(self) -> Recurrence:
        """The update rule that `operator` and the five fields below it give."""
        return Recurrence(**{name: getattr(self, name) for name in _OPERATOR_DEFAULTS})

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
            self, **dict.fromkeys(_OPERATOR_DEFAULTS, None), operator=operator
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


def layer_kinds(config: ModelConfig, liza: LizaConfig | None) -> tuple[LayerKind, ...]:
    """The kind of each layer of a Titan, in order: the base model's, and "kept" ones.

    Raises:
      ValueError: if `liza.full_layers` names a layer that the model lacks or windows itself, or
        leaves no layer to give a window and a memory.
    """
    if liza is None or not liza.full_layers:
        return config.layer_kinds
    kinds: list[LayerKind] = list(config.layer_kinds)
    for layer in liza.full_layers:
        if layer >= config.num_layers:
            raise ValueError(
                f"full_layers names layer {layer}, but the model has {config.num_layers} layers, "
                "counted from 0."
            )
        if kinds[layer] == "sliding":
            raise ValueError(
                f"full_layers names layer {layer}, which the base model windows itself, so it has "
                f"no full attention to keep; layers that have: {_listed(config, 'full')}."
            )
        kinds[layer] = "kept"
    if "full" not in kinds:
        raise ValueError(
            f"full_layers names every layer with full attention ({_listed(config, 'full')}), which "
            "leaves none for the window and the memory: name fewer, or load the base model alone."
        )
    return tuple(kinds)


def _listed(config: ModelConfig, kind: LayerKind) -> str:
    found = [str(i) for i, each in enumerate(config.layer_kinds) if each == kind]
    return ", ".join(found) or "none"


def memory_layers(config: ModelConfig, liza: LizaConfig | None) -> tuple[int, ...]:
    """The layers of a model that have a memory, in order."""
    if liza is None:
        return ()
    return tuple(i for i, kind in enumerate(layer_kinds(config, liza)) if liza.has_memory(kind))


def runs_memory(config: ModelConfig, liza: LizaConfig | None) -> bool:
    """Whether any layer's memory ever holds tokens."""
    return liza is not None and any(map(liza.runs_memory, set(layer_kinds(config, liza))))
