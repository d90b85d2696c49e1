"""Arguments of `ModelConfig` for known models."""

from typing import Any

from tptt_jax.config.attention import AttentionConfig
from tptt_jax.config.mlp import MlpConfig
from tptt_jax.config.norm import NormConfig
from tptt_jax.config.rope import RopeConfig

TINY: dict[str, Any] = {
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
SMOLLM2_135M: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 49152,
    "embed_dim": 576,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "mlp_dim": 1536,
    "norm": NormConfig(eps=1e-5),
    "rope": RopeConfig(theta=100_000.0),
    "max_positions": 8192,
    "bos_token_id": 0,
    "eos_token_ids": (0,),
}
GEMMA3_270M: dict[str, Any] = {
    "family": "gemma3_text",
    "vocab_size": 262144,
    "embed_dim": 640,
    "num_layers": 18,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 256,
    "mlp_dim": 2048,
    "mlp": MlpConfig(activation="gelu_tanh"),
    "norm": NormConfig(offset=True, placement="both"),
    "attention": AttentionConfig(qk_norm="head", query_scale=256**-0.5),
    "scale_embeddings": True,
    "layer_kinds": (("sliding",) * 5 + ("full",)) * 3,
    "sliding_window": 512,
    "rope": RopeConfig(theta=1_000_000.0),
    "sliding_rope": RopeConfig(theta=10_000.0),
    "max_positions": 32768,
    "bos_token_id": 2,
    "eos_token_ids": (1,),
    "pad_token_id": 0,
}
LLAMA3_2_1B: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 128256,
    "embed_dim": 2048,
    "num_layers": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 64,
    "mlp_dim": 8192,
    "norm": NormConfig(eps=1e-5),
    "rope": RopeConfig(
        theta=500_000.0,
        scaling="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    ),
    "max_positions": 131072,
    "bos_token_id": 128000,
    "eos_token_ids": (128001,),
}
