"""Tiny checkpoints written by hand: key names and shapes are spelled out, not taken from ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 5e5,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": None,
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama or Gemma 3 checkpoint, from the transformers sources."""
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    gemma = config["model_type"] == "gemma3_text"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], embed),
        "model.norm.weight": (embed,),
    }
    for layer in range(config["num_hidden_layers"]):
        block = {
            "self_attn.q_proj.weight": (queries, embed),
            "self_attn.k_proj.weight": (keys, embed),
            "self_attn.v_proj.weight": (keys, embed),
            "self_attn.o_proj.weight": (embed, queries),
            "mlp.gate_proj.weight": (mlp, embed),
            "mlp.up_proj.weight": (mlp, embed),
            "mlp.down_proj.weight": (embed, mlp),
            "input_layernorm.weight": (embed,),
            "post_attention_layernorm.weight": (embed,),
        }
        if gemma:
            block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (
                config["head_dim"],
            )
            block["pre_feedforward_layernorm.weight"] = (embed,)
            block["post_feedforward_layernorm.weight"] = (embed,)
        if config.get("attention_bias"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                block[f"self_attn.{name}.bias"] = block[f"self_attn.{name}.weight"][:1]
        if config.get("mlp_bias"):
            for name in ("gate_proj", "up_proj", "down_proj"):
                block[f"mlp.{name}.bias"] = block[f"mlp.{name}.weight"][:1]
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if not config.get("tie_word_embeddings", gemma):
        shapes["lm_head.weight"] = (config["vocab_size"], embed)
    return shapes


def random_tensors(
    shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (0.2 * rng.standard_normal(shape)).astype(np.float32).astype(dtype)
        for name, shape in shapes.items()
    }


def write_directory(
    path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """An HF directory; the weights go through the official safetensors package."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(hf_shapes(config)) if tensors is None else tensors
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
