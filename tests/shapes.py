"""Shapes of tiny models that several tests need."""

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
