"""Pretrained transformers become Titans: linear-attention memory, LoRA, constant memory."""

from tptt_jax.config import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.inference.generate import generate
from tptt_jax.layers.linear_attention import LinearAttention
from tptt_jax.model import CausalLM, init_cache

__all__ = [
    "CausalLM",
    "LinearAttention",
    "LizaConfig",
    "LoraConfig",
    "ModelConfig",
    "generate",
    "init_cache",
]
