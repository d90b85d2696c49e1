"""The configuration of a pretrained decoder: sizes, norms, positions, attention."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from tptt_jax.config.checks import check_at_least, check_at_most, check_choice, is_int32
from tptt_jax.config.rope import RopeConfig

BaseLayerKind = Literal["full", "sliding"]
"""What layers of a base model are."""
LayerKind = Literal["full", "sliding", "kept"]
"""What layers of a Titan are: "kept" ones are full in the base model and stay so, without a
window and a memory (`LizaConfig.full_layers`)."""
Norm = Literal["rms", "layer"]
NormPlacement = Literal["before", "after", "both"]
QkNorm = Literal["head", "full"]
PositionEmbedding = Literal["rotary", "learned"]
Activation = Literal["silu", "gelu_tanh"]
Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: "none": only cheap intermediates; "dots": everything but
products with weights; "full": whole layers, from their inputs."""

MAX_LAYERS = 10_000
"""Upper bound; rejects corrupt configurations before anything is allocated."""
_MAX_EXPERTS = 1 << 12
_PLAIN_ROPE = RopeConfig()


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
    """Query heads of each layer if layers differ, else empty; `num_heads` is then the maximum."""
    num_kv_heads_per_layer: tuple[int, ...] = ()
    """Key/value heads of each layer, as `num_heads_per_layer`."""
    mlp_dim_per_layer: tuple[int, ...] = ()
    """Width of the MLP of each layer, as `num_heads_per_layer`."""
    activation: Activation = "silu"
    """Activation of the MLP, or of its gate if it has one."""
    gated_mlp: bool = True
    """down(activation(gate(x)) * up(x)); False: down(activation(up(x)))."""
    num_experts: int = 0
    """Experts of the MLP; a router chooses some for every token; 0: one plain MLP."""
    experts_per_token: int = 0
    """Experts chosen for every token."""
    normalize_expert_weights: bool = False
    """The chosen experts' weights are divided by their sum."""
    norm: Norm = "rms"
    """RMS norm, or LayerNorm (which subtracts the mean)."""
    norm_eps: float = 1e-6
    norm_weight: bool = True
    """Norms of the residual stream have a learned weight."""
    norm_bias: bool = False
    """Norms of the residual stream have a learned bias."""
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
    layer_kinds: tuple[BaseLayerKind, ...] = ()
    """One per layer; empty means every layer is "full"."""
    sliding_window: int | None = None
    """Tokens that a "sliding" layer sees, the current one included."""
    position_embedding: PositionEmbedding = "rotary"
    """"learned": a table of max_positions vectors is added to the embeddings."""
    rope: RopeConfig = _PLAIN_ROPE
    sliding_rope: RopeConfig | None = None
    """The rotary embedding of "sliding" layers; None: the same as the others."""
    max_positions: int = 8192
    """Longest context of the pretraining, in tokens."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Fills `layer_kinds` and rejects sizes that do not fit together."""
        check_at_least(
            self,
            1,
            *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_dim", "sliding_window", "max_positions"),
        )
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {self.num_layers}.")
        self._check_per_layer()
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not is_int32(token):
                raise ValueError(f"token ids must be integers, got {token!r:.99}.")
        if self.head_dim % 2 and self.position_embedding == "rotary":
            raise ValueError(
                f"head_dim must be even for the rotary embedding, got {self.head_dim}."
            )
        for rope in (self.rope, self.sliding_rope):
            if rope is not None:
                rope.check_head_dim(self.head_dim)
        check_choice("activation", self.activation, Activation)
        check_choice("norm", self.norm, Norm)
        check_choice("norm_placement", self.norm_placement, NormPlacement)
        check_choice("position_embedding", self.position_embedding, PositionEmbedding)
        if self.qk_norm is not None:
            check_choice("qk_norm", self.qk_norm, QkNorm)
        for name in ("clip_qkv", "query_scale", "attention_softcap", "final_softcap"):
            value = getattr(self, name)
            # A negative width under the root of a query's scale makes a complex one.
            if value is not None and (isinstance(value, complex) or not 0 < value < math.inf):
                raise ValueError(f"{name} must be positive or None, got {value}.")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must lie in [0, 1), got {self.norm_eps}.")
        check_at_least(self, 0, "num_experts", "experts_per_token")
        check_at_most(self, _MAX_EXPERTS, "num_experts")
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
            check_choice("each of layer_kinds", kind, BaseLayerKind)
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
        """This configuration with the sizes of one layer."""
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

    @property
    def fixed_up_to(self) -> int | None:
        """Tokens up to which rotary frequencies do not depend on the length; None: any number."""
        if self.position_embedding != "rotary":
            return None
        ropes = {self.rope_of(kind) for kind in self.layer_kinds}
        ends = [rope.original_max_positions for rope in ropes if rope.depends_on_length]
        return min(ends, default=None)

    def at_length(self, tokens: int) -> Self:
        """This model with the rotary frequencies of texts of this length."""
        sliding = self.sliding_rope
        return dataclasses.replace(
            self,
            rope=self.rope.at_length(tokens, self.head_dim),
            sliding_rope=None if sliding is None else sliding.at_length(tokens, self.head_dim),
        )

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
