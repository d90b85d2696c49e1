"""Pretrained transformers become Titans: linear-attention memory, LoRA, constant memory.

Offered: the model, its configurations and parameter types, generation, saved states. Training is in
`tptt_jax.training`, operators are in `tptt_jax.ops`.
"""

from tptt_jax.config import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.decoder import DecodingState
from tptt_jax.inference.generate import generate
from tptt_jax.inference.prefill import read
from tptt_jax.inference.snapshot import load_state, save_state
from tptt_jax.inference.state import fork_state, state_bytes
from tptt_jax.layers.linear_attention import LinearAttention
from tptt_jax.layers.parameters import AdapterParam, BaseParam, MemoryParam
from tptt_jax.model import CausalLM, fix_context, init_cache
from tptt_jax.version import __version__
from tptt_jax.warm_up import warm_up

__all__ = [
    "AdapterParam",
    "BaseParam",
    "CausalLM",
    "DecodingState",
    "LinearAttention",
    "LizaConfig",
    "LoraConfig",
    "MemoryParam",
    "ModelConfig",
    "__version__",
    "fix_context",
    "fork_state",
    "generate",
    "init_cache",
    "load_state",
    "read",
    "save_state",
    "state_bytes",
    "warm_up",
]
