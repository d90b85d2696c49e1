"""Tiny checkpoints with key names and shapes written by hand, independent of our tables."""

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
QWEN2: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 40,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN3: dict[str, Any] = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
OLMO2: dict[str, Any] = LLAMA | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
OLMOE: dict[str, Any] = LLAMA | {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
}
# What each family's layers have beside the four projections, from the transformers sources.
_NORMS = {
    "gemma3_text": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_PER_HEAD, _FULL = ("gemma3_text", "qwen3"), ("olmo2", "olmoe")


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint, from the transformers sources."""
    family, embed, mlp = config["model_type"], config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], embed),
        "model.norm.weight": (embed,),
    }
    block = {
        "self_attn.q_proj.weight": (queries, embed),
        "self_attn.k_proj.weight": (keys, embed),
        "self_attn.v_proj.weight": (keys, embed),
        "self_attn.o_proj.weight": (embed, queries),
    }
    for norm in _NORMS.get(family, ("input_layernorm", "post_attention_layernorm")):
        block[f"{norm}.weight"] = (embed,)
    if family in _PER_HEAD:
        block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (config["head_dim"],)
    if family in _FULL:
        block |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
    for name in ("q_proj", "k_proj", "v_proj") if family == "qwen2" else biased:
        block[f"self_attn.{name}.bias"] = block[f"self_attn.{name}.weight"][:1]
    mlp_shapes = {"gate_proj": (mlp, embed), "up_proj": (mlp, embed), "down_proj": (embed, mlp)}
    if "num_experts" in config:
        block["mlp.gate.weight"] = (config["num_experts"], embed)
        for expert in range(config["num_experts"]):
            for name, shape in mlp_shapes.items():
                block[f"mlp.experts.{expert}.{name}.weight"] = shape
    else:
        for name, shape in mlp_shapes.items():
            block[f"mlp.{name}.weight"] = shape
            if config.get("mlp_bias"):
                block[f"mlp.{name}.bias"] = shape[:1]
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if not config.get("tie_word_embeddings", family == "gemma3_text"):
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
