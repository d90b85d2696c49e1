"""The configuration of a pretrained decoder: sizes, positions, and its parts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from tptt_jax.config import presets
from tptt_jax.config.attention import AttentionConfig
from tptt_jax.config.checks import check_at_least, check_choice, check_positive, is_int32
from tptt_jax.config.flat_names import PARTS, accept_flat_names
from tptt_jax.config.layer_sizes import LayerSizes
from tptt_jax.config.mlp import ExpertsConfig, MlpConfig
from tptt_jax.config.norm import NormConfig
from tptt_jax.config.rope import RopeConfig

BaseLayerKind = Literal["full", "sliding"]
"""What layers of a base model are."""
LayerKind = Literal["full", "sliding", "kept"]
"""What layers of a Titan are: "kept" ones are full in the base model and stay so, without a
window and a memory (`LizaConfig.full_layers`)."""
PositionEmbedding = Literal["rotary", "learned"]
Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: "none": only cheap intermediates; "dots": everything but
products with weights; "full": whole layers, from their inputs."""

MAX_LAYERS = 10_000
"""Upper bound; rejects corrupt configurations before anything is allocated."""


@accept_flat_names
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, whatever its family.

    Sizes are here; how norms, attention and MLPs compute is in parts with defaults of their own:
    ``ModelConfig.tiny(num_heads=8, norm=NormConfig(placement="after"))``.
    """

    family: str
    """The Hugging Face model type it comes from; only `convert` reads it."""
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    per_layer: LayerSizes = field(default_factory=LayerSizes)
    """Heads and MLP widths of each layer if layers differ; those above are then the maxima."""
    mlp: MlpConfig = field(default_factory=MlpConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    final_softcap: float | None = None
    """Logits of the head are final_softcap * tanh(logits / final_softcap); None: unchanged."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by sqrt(embed_dim), rounded to the weights' dtype."""
    tie_embeddings: bool = True
    layer_kinds: tuple[BaseLayerKind, ...] = ()
    """One per layer; empty means every layer is "full"."""
    sliding_window: int | None = None
    """Tokens that a "sliding" layer sees, the current one included."""
    position_embedding: PositionEmbedding = "rotary"
    """"learned": a table of max_positions vectors is added to the embeddings."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_rope: RopeConfig | None = None
    """The rotary embedding of "sliding" layers; None: the same as the others."""
    max_positions: int = 8192
    """Longest context of the pretraining, in tokens."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Fills `layer_kinds` and rejects sizes that do not fit together."""
        for name, kind in PARTS.items():
            if not isinstance(part := getattr(self, name), kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {part!r:.99}.")
        check_at_least(
            self,
            1,
            "vocab_size",
            "embed_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "sliding_window",
            "max_positions",
        )
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {self.num_layers}.")
        self._check_heads()
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not is_int32(token):
                raise ValueError(f"token ids must be integers, got {token!r:.99}.")
        check_choice("position_embedding", self.position_embedding, PositionEmbedding)
        for rope in (self.rope, self.sliding_rope):
            if rope is not None:
                rope.check_head_dim(self.head_dim)
        check_positive(self, "final_softcap")
        self._check_kinds()

    def _check_heads(self) -> None:
        self.per_layer.check(
            self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_dim=self.mlp_dim,
        )
        for layer in range(self.num_layers):
            heads, kv_heads, _ = self.layer_sizes(layer)
            if heads % kv_heads:
                raise ValueError(
                    f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads}), "
                    f"in layer {layer} it is not."
                )
        if self.head_dim % 2 and self.position_embedding == "rotary":
            raise ValueError(
                f"head_dim must be even for the rotary embedding, got {self.head_dim}."
            )

    def _check_kinds(self) -> None:
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

    def layer_sizes(self, layer: int) -> tuple[int, int, int]:
        """Query heads, key/value heads and MLP width of one layer."""
        own = self.per_layer
        heads, kv_heads, mlp_dim = (
            sizes[layer] if sizes else common
            for sizes, common in (
                (own.num_heads, self.num_heads),
                (own.num_kv_heads, self.num_kv_heads),
                (own.mlp_dim, self.mlp_dim),
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
            per_layer=LayerSizes(),
        )

    @property
    def attention_scale(self) -> float:
        """Factor on the attention logits."""
        scale = self.attention.query_scale
        return self.head_dim**-0.5 if scale is None else scale

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
        return cls(**presets.TINY | changes)

    @classmethod
    def smollm2_135m(cls) -> Self:
        """The shape of HuggingFaceTB/SmolLM2-135M."""
        return cls(**presets.SMOLLM2_135M)

    @classmethod
    def gemma3_270m(cls) -> Self:
        """The shape of google/gemma-3-270m."""
        return cls(**presets.GEMMA3_270M)

    @classmethod
    def llama3_2_1b(cls) -> Self:
        """The shape of meta-llama/Llama-3.2-1B."""
        return cls(**presets.LLAMA3_2_1B)
