"""Shapes of tiny models that several tests need."""

from typing import Any

from tptt_jax import ModelConfig
from tptt_jax.config import RopeConfig

GEMMA = ModelConfig.tiny(
    num_layers=5,
    mlp_dim=16,
    num_kv_heads=1,
    activation="gelu_tanh",
    norm_offset=True,
    norm_placement="both",
    qk_norm="head",
    query_scale=0.3,
    scale_embeddings=True,
    layer_kinds=("sliding", "sliding", "full", "sliding", "sliding"),
    sliding_window=5,
    rope=RopeConfig(theta=1e6, scaling="linear", factor=4.0),
    sliding_rope=RopeConfig(theta=1e4),
)
# Sizes that differ by layer, one projection for q, k and v: two stacks.
UNEVEN = ModelConfig.tiny(
    num_layers=2,
    fused_qkv=True,
    qk_norm="head",
    num_heads_per_layer=(2, 4),
    num_kv_heads_per_layer=(1, 2),
    mlp_dim=16,
    mlp_dim_per_layer=(8, 16),
)
LLAMA = ModelConfig.tiny(num_layers=2, mlp_dim=16)
BIASED = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=16,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    tie_embeddings=False,
    attention_softcap=2.0,
    final_softcap=3.0,
)
LEARNED_POSITIONS = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=16,
    num_kv_heads=4,
    activation="gelu_tanh",
    gated_mlp=False,
    norm="layer",
    norm_bias=True,
    fused_qkv=True,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    position_embedding="learned",
)
EXPERTS = ModelConfig.tiny(
    num_layers=2,
    mlp_dim=8,
    num_experts=5,
    experts_per_token=2,
    norm_placement="after",
    norm_float32=True,
    qk_norm="full",
    clip_qkv=2.0,
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
