"""What a model is: frozen, validated descriptions without any input or output."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

LayerKind = Literal["full", "sliding"]
Norm = Literal["rms", "layer"]
NormPlacement = Literal["before", "after", "both"]
QkNorm = Literal["head", "full"]
PositionEmbedding = Literal["rotary", "learned"]
Activation = Literal["silu", "gelu_tanh"]
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
Gate = Literal["k", "v", "kv", "constant"]
Mag = Literal["learned", "scheduled"]
LinearScale = Literal["unit", "match", "projected"]
Precision = Literal["auto", "highest", "high", "default"]
Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again: "none": only what takes longer to keep; "dots": all but
products with weights; "full": whole layers, of which only the input is kept."""

MAX_LAYERS = 10_000
"""More than this is a mistake or an attack: lists of this length are made to describe layers."""
# No weight is wider, no model has more; work is done for each before anything can disagree.
_MAX_RANK = 1 << 16
_MAX_EXPERTS = 1 << 12

# What each of the paper's operators sets, unless the caller says otherwise.
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


# What else a projection is called, in other families.
_OTHER_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("out_proj",)}


def _check_choice(name: str, value: Any, choices: Any) -> None:
    options = get_args(choices)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}.")


def _is_int32(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _check_at_least(config: Any, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not _is_int32(value):
            raise ValueError(f"{name} must be an integer below 2**31, got {value!r:.99}.")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def _check_at_most(config: Any, maximum: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) > maximum:
            raise ValueError(f"{name} must be at most {maximum}, got {getattr(config, name)}.")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    """How the frequencies were stretched for longer contexts."""
    factor: float = 1.0
    """Stretch factor of "linear" and "llama3"."""
    low_freq_factor: float = 1.0
    """"llama3": wavelengths above original_max_positions / this are stretched fully."""
    high_freq_factor: float = 4.0
    """"llama3": wavelengths below original_max_positions / this are left alone."""
    original_max_positions: int = 8192
    """"llama3": the context length before stretching, in tokens."""

    def __post_init__(self) -> None:
        """Rejects values no rotary embedding can have."""
        if self.scaling not in ("none", "linear", "llama3"):
            raise ValueError(
                f"rope scaling must be one of none, linear, llama3, got {self.scaling!r}."
            )
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "llama3 rope scaling needs low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if not (0 < self.theta < math.inf and 0 < self.factor < math.inf):
            raise ValueError(
                f"rope theta and factor must be positive, got {self.theta} and {self.factor}."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, whatever its family."""

    family: str
    """The Hugging Face model type it comes from; only `convert` reads it."""
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_heads_per_layer: tuple[int, ...] = ()
    """Query heads of each layer where layers differ, else empty; `num_heads` is then the most."""
    num_kv_heads_per_layer: tuple[int, ...] = ()
    """Key/value heads likewise."""
    mlp_dim_per_layer: tuple[int, ...] = ()
    """Width of the MLP likewise."""
    activation: Activation = "silu"
    """Of the MLP; of its gate if it has one."""
    gated_mlp: bool = True
    """down(activation(gate(x)) * up(x)); False: down(activation(up(x)))."""
    num_experts: int = 0
    """Experts of the MLP, of which a router chooses some for every token; 0: one plain MLP."""
    experts_per_token: int = 0
    """Experts that are chosen."""
    normalize_expert_weights: bool = False
    """The chosen experts' weights are divided by their sum."""
    norm: Norm = "rms"
    """RMS norm, or LayerNorm (which subtracts the mean)."""
    norm_eps: float = 1e-6
    norm_weight: bool = True
    """Norms of the residual stream have a learned weight."""
    norm_bias: bool = False
    """And a learned bias."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight, in float32."""
    norm_float32: bool = False
    """Norms multiply by the weight in float32, before the cast to the input's dtype."""
    norm_placement: NormPlacement = "before"
    """Norm of each sublayer's input, of its output before the residual addition, or both."""
    qk_norm: QkNorm | None = None
    """RMS norm on queries and keys before the rotary embedding: over each head, or over the
    full width of the projection before it is cut into heads."""
    clip_qkv: float | None = None
    """Queries, keys and values of softmax attention are clipped to [-clip_qkv, clip_qkv], after
    any q/k norm."""
    fused_qkv: bool = False
    """One projection qkv_proj gives queries, keys and values side by side; adapters sit on it."""
    attention_bias: bool = False
    """Biases on the q, k and v projections."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    """Factor on the attention logits; None is head_dim ** -0.5."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    scale_embeddings: bool = False
    """Embeddings are multiplied by sqrt(embed_dim), rounded to the weights' dtype."""
    tie_embeddings: bool = True
    layer_kinds: tuple[LayerKind, ...] = ()
    """One per layer; empty means every layer is "full"."""
    sliding_window: int | None = None
    """Tokens that a "sliding" layer sees, the current one included."""
    position_embedding: PositionEmbedding = "rotary"
    """"learned": a table of max_positions vectors is added to the embeddings."""
    rope: RopeConfig = RopeConfig()
    sliding_rope: RopeConfig | None = None
    """The rotary embedding of "sliding" layers; None: the same as the others."""
    max_positions: int = 8192
    """Longest context of the pretraining, in tokens."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Fills `layer_kinds` and rejects sizes that do not fit together."""
        _check_at_least(
            self,
            1,
            *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_dim", "sliding_window", "max_positions"),
        )
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {self.num_layers}.")
        self._check_per_layer()
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not _is_int32(token):
                raise ValueError(f"token ids must be integers, got {token!r:.99}.")
        if self.head_dim % 2 and self.position_embedding == "rotary":
            raise ValueError(
                f"head_dim must be even for the rotary embedding, got {self.head_dim}."
            )
        _check_choice("activation", self.activation, Activation)
        _check_choice("norm", self.norm, Norm)
        _check_choice("norm_placement", self.norm_placement, NormPlacement)
        _check_choice("position_embedding", self.position_embedding, PositionEmbedding)
        if self.qk_norm is not None:
            _check_choice("qk_norm", self.qk_norm, QkNorm)
        for name in ("clip_qkv", "query_scale", "attention_softcap", "final_softcap"):
            value = getattr(self, name)
            # A negative width under the root of a query's scale makes a complex one.
            if value is not None and (isinstance(value, complex) or not 0 < value < math.inf):
                raise ValueError(f"{name} must be positive or None, got {value}.")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must lie in [0, 1), got {self.norm_eps}.")
        _check_at_least(self, 0, "num_experts", "experts_per_token")
        _check_at_most(self, _MAX_EXPERTS, "num_experts")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must lie between 1 and num_experts ({self.num_experts}), got "
                f"{self.experts_per_token}."
            )
        kinds = self.layer_kinds or ("full",) * self.num_layers
        object.__setattr__(self, "layer_kinds", tuple(kinds))
        if len(kinds) != self.num_layers:
            raise ValueError(
                f"layer_kinds has {len(kinds)} entries for num_layers = {self.num_layers}."
            )
        for kind in kinds:
            _check_choice("each of layer_kinds", kind, LayerKind)
        if "sliding" in kinds and self.sliding_window is None:
            raise ValueError(
                'layer_kinds has "sliding" layers: sliding_window must say how wide they are.'
            )

    def _check_per_layer(self) -> None:
        for name in ("num_heads", "num_kv_heads", "mlp_dim"):
            sizes = tuple(getattr(self, f"{name}_per_layer"))
            object.__setattr__(self, f"{name}_per_layer", sizes)
            if not sizes:
                continue
            if len(sizes) != self.num_layers:
                raise ValueError(
                    f"{name}_per_layer has {len(sizes)} entries for num_layers = {self.num_layers}."
                )
            if min(sizes) < 1 or max(sizes) != getattr(self, name):
                raise ValueError(
                    f"{name}_per_layer must lie between 1 and {name} ({getattr(self, name)}) and "
                    f"reach it, got {sizes}."
                )
        for layer in range(self.num_layers):
            heads, kv_heads, _ = self.layer_sizes(layer)
            if heads % kv_heads:
                raise ValueError(
                    f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads}), "
                    f"in layer {layer} it is not."
                )

    def layer_sizes(self, layer: int) -> tuple[int, int, int]:
        """Query heads, key/value heads and MLP width of one layer."""
        heads, kv_heads, mlp_dim = (
            sizes[layer] if sizes else common
            for sizes, common in (
                (self.num_heads_per_layer, self.num_heads),
                (self.num_kv_heads_per_layer, self.num_kv_heads),
                (self.mlp_dim_per_layer, self.mlp_dim),
            )
        )
        return heads, kv_heads, mlp_dim

    def of_layer(self, layer: int) -> Self:
        """This configuration with the sizes that one layer has."""
        heads, kv_heads, mlp_dim = self.layer_sizes(layer)
        return dataclasses.replace(
            self,
            num_heads=heads,
            num_kv_heads=kv_heads,
            mlp_dim=mlp_dim,
            num_heads_per_layer=(),
            num_kv_heads_per_layer=(),
            mlp_dim_per_layer=(),
        )

    @property
    def attention_scale(self) -> float:
        """Factor on the attention logits."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def rope_of(self, kind: LayerKind) -> RopeConfig:
        """The rotary embedding of layers of this kind."""
        if kind == "sliding" and self.sliding_rope is not None:
            return self.sliding_rope
        return self.rope

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """A Llama of a few thousand parameters, for tests and examples."""
        defaults: dict[str, Any] = {
            "family": "llama",
            "vocab_size": 97,
            "embed_dim": 32,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "mlp_dim": 48,
            "max_positions": 256,
        }
        return cls(**defaults | changes)

    @classmethod
    def smollm2_135m(cls) -> Self:
        """The shape of HuggingFaceTB/SmolLM2-135M."""
        return cls(
            family="llama",
            vocab_size=49152,
            embed_dim=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            mlp_dim=1536,
            norm_eps=1e-5,
            rope=RopeConfig(theta=100_000.0),
            max_positions=8192,
            bos_token_id=0,
            eos_token_ids=(0,),
        )

    @classmethod
    def gemma3_270m(cls) -> Self:
        """The shape of google/gemma-3-270m."""
        return cls(
            family="gemma3_text",
            vocab_size=262144,
            embed_dim=640,
            num_layers=18,
            num_heads=4,
            num_kv_heads=1,
            head_dim=256,
            mlp_dim=2048,
            activation="gelu_tanh",
            norm_offset=True,
            norm_placement="both",
            qk_norm="head",
            query_scale=256**-0.5,
            scale_embeddings=True,
            layer_kinds=(("sliding",) * 5 + ("full",)) * 3,
            sliding_window=512,
            rope=RopeConfig(theta=1_000_000.0),
            sliding_rope=RopeConfig(theta=10_000.0),
            max_positions=32768,
            bos_token_id=2,
            eos_token_ids=(1,),
            pad_token_id=0,
        )

    @classmethod
    def llama3_2_1b(cls) -> Self:
        """The shape of meta-llama/Llama-3.2-1B."""
        return cls(
            family="llama",
            vocab_size=128256,
            embed_dim=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=8192,
            norm_eps=1e-5,
            rope=RopeConfig(
                theta=500_000.0,
                scaling="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            ),
            max_positions=131072,
            bos_token_id=128000,
            eos_token_ids=(128001,),
        )


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A resolved update rule: what an operator's name stands for."""

    num_householder: int
    trick: Trick
    beta_gate: Gate
    alpha_gate: Gate
    state_activation: Literal["none", "gelu"]


@dataclass(frozen=True, kw_only=True)
class LizaConfig:
    """The linear-attention memory of every layer, and how it is mixed in (MaG).

    The fields that are None by default take what `operator` says, so that
    ``LizaConfig(operator="delta_rule")`` has one Householder step and
    ``LizaConfig(operator="delta_rule", num_householder=3)`` has three. After
    construction they hold the resolved values; to switch an existing
    configuration to another operator use `with_operator`.
    """

    operator: Operator = "delta_product"
    """Named update rule of the paper; sets the five fields below it. "tptt_reference" computes what
    the package tptt 0.12.1 does, for adapters that were trained with it (see `tptt_reference`)."""
    num_householder: int | None = None
    """Householder steps per token (the paper's order n); delta_product: 2."""
    trick: Trick | None = None
    """How a token becomes num_householder virtual tokens; delta_product: derivative."""
    beta_gate: Gate | None = None
    """What the write gate is computed from; delta_product: k."""
    alpha_gate: Gate | None = None
    """What the forget gate is computed from; delta_product: constant (no forgetting)."""
    state_activation: Literal["none", "gelu"] | None = None
    """Non-linearity on the state after every chunk_size tokens (paper eq. 8); the only option
    whose result depends on chunk_size; delta_product: none."""
    vector_beta: bool = False
    """One write gate per channel (paper eq. 3) instead of one per head."""
    expand_gates: bool = False
    """Expand the write gate into virtual tokens like k and v, as the paper's text has it; a
    differenced gate turns negative and lets the state grow."""
    mag: Mag = "learned"
    """"learned": one logit per head; "scheduled": one value for the model, set from outside."""
    mag_init: float = 0.05
    """Share of the memory in the mixture at the start, in (0, 1); "scheduled": in [0, 1]."""
    linear_scale: LinearScale = "match"
    """"match": each head's memory output gets the RMS of its softmax output; "unit": the
    paper's unit RMS; "projected": the reference's base_scale_attn, after the projection."""
    cross_gate: bool = False
    """Add the product of both terms to their sum, after the projection."""
    softmax: bool = True
    """False: a purely linear model (share 1, unit scale) without softmax and KV cache."""
    softmax_window: int | None = None
    """Tokens that softmax attention sees, the current one included; None: all."""
    softmax_sinks: int = 4
    """First tokens of a document that a windowed layer goes on seeing (arXiv:2309.17453)."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; the result does not depend on it."""
    precision: Precision = "auto"
    """Of the matrix products that read and write the memory of a row: "highest" is float32
    on every backend; "high" and "default" are what a GPU or TPU does faster, with fewer bits (a CPU
    does the same in all three). "auto" is "highest" in a float32 model and "default" in one of
    half precision. The state, the inverse of each chunk's system and single tokens stay exact."""
    memory_rank: int = 0
    """Rank of the memory's own low-rank deltas on the q, k and v projections; 0: none."""
    memory_alpha: float = 16.0
    """Those deltas are scaled by memory_alpha / memory_rank."""
    dropout: float = 0.0
    """Dropout on the memory's output while training."""

    def __post_init__(self) -> None:
        """Resolves what the operator sets and rejects impossible combinations."""
        _check_choice("operator", self.operator, Operator)
        resolved = _OPERATOR_DEFAULTS | OPERATORS.get(self.operator, {})
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_choice("trick", self.trick, Trick)
        _check_choice("beta_gate", self.beta_gate, Gate)
        _check_choice("alpha_gate", self.alpha_gate, Gate)
        _check_choice("mag", self.mag, Mag)
        _check_choice("linear_scale", self.linear_scale, LinearScale)
        _check_choice("state_activation", self.state_activation, Literal["none", "gelu"])
        _check_choice("precision", self.precision, Precision)
        _check_at_least(self, 1, "num_householder", "chunk_size", "softmax_window")
        _check_at_least(self, 0, "softmax_sinks", "memory_rank")
        _check_at_most(self, _MAX_RANK, "num_householder", "softmax_sinks", "memory_rank")
        self._check_share()
        if self.operator == "tptt_reference" and (self.vector_beta or self.expand_gates):
            raise ValueError(
                'operator "tptt_reference" has gates of its own kind: leave vector_beta and '
                "expand_gates False."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if not self.softmax:
            if self.cross_gate:
                raise ValueError("softmax=False leaves nothing to mix with: use cross_gate=False.")
            object.__setattr__(self, "linear_scale", "unit")

    def _check_share(self) -> None:
        if self.mag == "learned" and not 0 < self.mag_init < 1:
            raise ValueError(f"mag_init must lie strictly between 0 and 1, got {self.mag_init}.")
        if not 0 <= self.mag_init <= 1:
            raise ValueError(f"mag_init must lie between 0 and 1, got {self.mag_init}.")

    @property
    def recurrence(self) -> Recurrence:
        """What `operator` and the five fields below it come to."""
        return Recurrence(**{name: getattr(self, name) for name in _OPERATOR_DEFAULTS})

    def with_operator(self, operator: Operator) -> Self:
        """This configuration with another operator and everything that operator sets."""
        return dataclasses.replace(
            self, **dict.fromkeys(_OPERATOR_DEFAULTS, None), operator=operator
        )

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The paper's own setting: unit scale, one scheduled share (0.01, rising to 0.5)."""
        return cls(**{"mag": "scheduled", "mag_init": 0.01, "linear_scale": "unit"} | changes)

    @classmethod
    def tptt_reference(cls, mode: str = "delta_product", **changes: Any) -> Self:
        """What the package tptt 0.12.1 computes by default in one of its nine operator modes.

        Its settings are called `chunk_size` (max_chunk_size), `mag_init` (mag_weight), `cross_gate`
        and `linear_scale="projected"` (base_scale_attn) here.

        Raises:
          ValueError: if there is no such mode.
        """
        if mode not in OPERATORS:
            raise ValueError(f"mode must be one of {', '.join(OPERATORS)}, got {mode!r}.")
        package: dict[str, Any] = {"mag": "scheduled", "mag_init": 0.5, "linear_scale": "unit"}
        return cls(**package | OPERATORS[mode] | changes, operator="tptt_reference")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685) on the projections that `targets` names."""

    rank: int = 8
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732), so that high ranks learn as well."""
    dropout: float = 0.05
    """Dropout on the adapter's input while training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of projections, or regular expressions that match a whole path such as
    "self_attn.q_proj". Where q, k and v are one projection, each of the three means qkv_proj;
    out_proj means o_proj."""

    def __post_init__(self) -> None:
        """Rejects values no adapter can have."""
        object.__setattr__(self, "targets", tuple(self.targets))
        _check_at_least(self, 1, "rank")
        _check_at_most(self, _MAX_RANK, "rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(
                    f"LoRA target {target!r} is not a valid regular expression: {error}."
                ) from None

    @property
    def scale(self) -> float:
        """Factor on the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def matches(self, path: str) -> bool:
        """Whether the projection at this dotted path, e.g. "self_attn.q_proj", is adapted."""
        return any(_target_matches(target, path) for target in self.targets)

    def check_targets(self, paths: Iterable[str]) -> None:
        """Raises ValueError if a target names none of the projections at `paths`."""
        known: Sequence[str] = sorted(set(paths))
        for target in self.targets:
            if not any(_target_matches(target, path) for path in known):
                raise ValueError(
                    f"LoRA target {target!r} matches no projection; the model has "
                    f"{', '.join(known)}."
                )


def _target_matches(target: str, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    names = (name, *_OTHER_NAMES.get(name, ()))
    return target in names or any(re.fullmatch(target, f"{parent}.{each}") for each in names)
