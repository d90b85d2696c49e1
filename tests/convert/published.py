"""config.json of checkpoints on the hub, as published, and whether ours maps their tensors."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.families import family_of
from convert.families.family import is_match
from convert.families.fields import Fields
from convert.formats import TensorInfo
from convert.loading import plan_for, variables_of
from convert.plan import check_tensors, match_names
from tptt_jax import CausalLM, LizaConfig, LoraConfig

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048},
        **{"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        **{"rope_scaling": LLAMA3, "tie_word_embeddings": True, "hidden_act": "silu"},
        **{"max_position_embeddings": 131072, "torch_dtype": "bfloat16"},
    },
    "OLMoE-1B-7B-0924": {
        **{"model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048},
        **{"intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
        **{"norm_topk_prob": False, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "clip_qkv": None},
        **{"max_position_embeddings": 4096, "tie_word_embeddings": False},
    },
    "Qwen2.5-1.5B": {
        **{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536},
        **{"intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        **{"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False},
        **{"tie_word_embeddings": True, "max_position_embeddings": 131072, "use_mrope": False},
    },
    "gemma-3-270m": {
        **{"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640},
        **{"intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4},
        **{"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        **{"sliding_window": 512, "_sliding_window_pattern": 6, "rope_scaling": None},
        **{"max_position_embeddings": 32768, "hidden_activation": "gelu_pytorch_tanh"},
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
    "Mistral-7B-v0.3": {
        **{"model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096},
        **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        **{"sliding_window": None, "max_position_embeddings": 32768},
        "tie_word_embeddings": False,
    },
    "OLMo-1B-hf": {
        **{"model_type": "olmo", "vocab_size": 50304, "hidden_size": 2048},
        **{"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "rope_theta": 1e4, "clip_qkv": None},
        **{"tie_word_embeddings": True, "max_position_embeddings": 2048},
    },
    "Qwen3-0.6B": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024},
        **{"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        **{"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        **{"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False},
        **{"tie_word_embeddings": True, "max_position_embeddings": 40960},
    },
    "OLMo-2-0425-1B": {
        **{"model_type": "olmo2", "vocab_size": 100352, "hidden_size": 2048},
        **{"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 5e5},
        **{"tie_word_embeddings": False, "max_position_embeddings": 4096},
    },
    "gpt2": {
        **{"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12},
        **{"n_head": 12, "n_ctx": 1024, "n_positions": 1024, "layer_norm_epsilon": 1e-5},
        "activation_function": "gelu_new",
    },
}


def openelm(size: str) -> dict[str, Any]:
    """apple/OpenELM-270M or -1_1B."""
    embed, heads = {
        "270M": (1280, [12] * 5 + [16] * 7 + [20] * 4),
        "1_1B": (2048, [16] * 3 + [20] * 7 + [24] * 8 + [28] * 6 + [32] * 4),
    }[size]
    layers = len(heads)
    return {
        **{"model_type": "openelm", "vocab_size": 32000, "model_dim": embed, "head_dim": 64},
        **{"num_transformer_layers": layers, "num_query_heads": heads, "num_gqa_groups": 4},
        **{"num_kv_heads": [each // 4 for each in heads], "ffn_dim_divisor": 256},
        "ffn_multipliers": np.linspace(0.5, 4.0, layers).round(2).tolist(),
        **{"ffn_with_glu": True, "activation_fn_name": "swish", "rope_freq_constant": 10000},
        **{"normalization_layer_name": "rms_norm", "normalize_qk_projections": True},
        **{"share_input_output_layers": True, "max_context_length": 2048},
        **{"rope_max_length": 4096, "bos_token_id": 1, "eos_token_id": 2},
    }


def check_published(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Maps every tensor of a checkpoint to a model of ours, none of which is ever allocated.

    Args:
      content: its config.json.
      shapes: its tensors.

    Returns:
      How many tensors were mapped.
    """
    family = family_of(content["model_type"])
    config = family.read_config(Fields(content, "config.json"))

    def build() -> CausalLM:
        rngs = nnx.Rngs(0)
        return CausalLM(
            config,
            LizaConfig(softmax_window=128),
            LoraConfig(),
            dtype=jnp.dtype("bfloat16"),
            rngs=rngs,
        )

    model = nnx.eval_shape(build)
    variables = variables_of(model)
    tensors = {name: TensorInfo(shape, "BF16", 0) for name, shape in shapes.items()}
    plan = match_names(plan_for(family.rules(config), model, variables), tensors, family.prefix)
    check_tensors(plan, tensors, lambda name: is_match(family.ignored, name))
    return sum(len(move.sources) for move in plan)
