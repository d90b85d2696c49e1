"""Shapes of tiny models that several tests need."""

from typing import Any

from tptt_jax import ModelConfig
from tptt_jax.config import (
    AttentionConfig,
    ExpertsConfig,
    LayerSizes,
    MlpConfig,
    NormConfig,
    RopeConfig,
)

GEMMA = ModelConfig.tiny(
    num_layers=5,
    mlp_dim=16,
    num_kv_heads=1,
    mlp=MlpConfig(activation="gelu_tanh"),
    norm=NormConfig(offset=True, placement="both"),
    attention=AttentionConfig(qk_norm="head", query_scale=0.3),
    scale_embeddings=True,
    layer_kinds=("sliding", "sliding", "full", "sliding", "sliding"),
    sliding_window=5,
    rope=RopeConfig(theta=1e6, scaling="linear", factor=4.0),
    sliding_rope=RopeConfig(theta=1e4),
)
# Sizes that differ by layer, one projection for q, k and v: two stacks.
UNEVEN = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=16,
    attention=AttentionConfig(fused_qkv=True, qk_norm="head"),
    per_layer=LayerSizes(num_heads=(2, 4), num_kv_heads=(1, 2), mlp_dim=(8, 16)),
)
LLAMA = ModelConfig.tiny(num_layers=2, mlp_dim=16)
BIASED = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=16,
    attention=AttentionConfig(bias=True, out_bias=True, softcap=2.0),
    mlp=MlpConfig(bias=True),
    tie_embeddings=False,
    final_softcap=3.0,
)
LEARNED_POSITIONS = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=16,
    num_kv_heads=4,
    mlp=MlpConfig(activation="gelu_tanh", gated=False, bias=True),
    norm=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(fused_qkv=True, bias=True, out_bias=True),
    position_embedding="learned",
)
EXPERTS = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=8,
    experts=ExpertsConfig(number=5, per_token=2),
    norm=NormConfig(placement="after", float32=True),
    attention=AttentionConfig(qk_norm="full", clip_qkv=2.0),
)
# Every operator once, and every option with at least one of them.
STREAMS: dict[str, tuple[ModelConfig, dict[str, Any] | None]] = {
    "delta_rule, own deltas": (LLAMA, {"operator": "delta_rule", "memory_rank": 2}),
    "delta_rule_v, vector beta, projected": (
        BIASED,
        {"operator": "delta_rule_v", "vector_beta": True, "linear_scale": "projected"},
    ),
    "delta_rule_kv, scheduled, unit": (
        LLAMA,
        {"operator": "delta_rule_kv", "mag": "scheduled", "linear_scale": "unit"},
    ),
    "delta_rule_gelu, window without sinks": (
        LLAMA,
        {"operator": "delta_rule_gelu", "softmax_window": 4, "softmax_sinks": 0},
    ),
    "gated_delta_rule, window with sinks": (
        LLAMA,
        {"operator": "gated_delta_rule", "softmax_window": 4, "softmax_sinks": 4},
    ),
    "delta_product, sliding and full layers": (
        GEMMA,
        {"operator": "delta_product", "softmax_window": 4, "softmax_sinks": 2},
    ),
    "delta_product_r, constant gates, cross gate": (
        LLAMA,
        {"operator": "delta_product_r", "beta_gate": "constant", "cross_gate": True},
    ),
    "delta_product_c, three steps, no softmax": (
        LLAMA,
        {"operator": "delta_product_c", "num_householder": 3, "softmax": False},
    ),
    "gated_delta_product, expanded gates": (
        LLAMA,
        {"operator": "gated_delta_product", "alpha_gate": "v", "expand_gates": True},
    ),
    "expanded vector gates, cross gate, projected": (
        BIASED,
        {
            "num_householder": 3,
            "beta_gate": "kv",
            "vector_beta": True,
            "expand_gates": True,
            "cross_gate": True,
            "linear_scale": "projected",
        },
    ),
    "no memory, sliding and full layers": (GEMMA, None),
    "layers of different sizes": (UNEVEN, {"softmax_window": 4, "softmax_sinks": 2}),
    "learned positions, window with sinks": (
        LEARNED_POSITIONS,
        {"softmax_window": 4, "softmax_sinks": 2, "memory_rank": 2},
    ),
    "experts": (EXPERTS, {"operator": "gated_delta_product"}),
}
