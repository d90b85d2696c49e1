"""Tiny configurations of every family, as transformers has them."""

import transformers as T

# Awkward sizes: an odd number of layers, grouped queries, windows shorter than the rows.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3}
GPT2 = {
    "vocab_size": 101,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CONFIGS = {
    "llama": T.LlamaConfig(**SIZES, head_dim=10, rope_parameters=LLAMA3),
    "gemma3_text": T.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "qwen2": T.Qwen2Config(**SIZES),
    "qwen2, windows, tied": T.Qwen2Config(**SIZES, **WINDOW, tie_word_embeddings=True),
    "qwen3": T.Qwen3Config(**SIZES, head_dim=10, tie_word_embeddings=True),
    "qwen3, windows, biases": T.Qwen3Config(**SIZES, **WINDOW, head_dim=10, attention_bias=True),
    "mistral": T.MistralConfig(**SIZES, head_dim=10, sliding_window=None),
    "mistral, window": T.MistralConfig(**SIZES, sliding_window=8),
    "olmo": T.OlmoConfig(**SIZES, tie_word_embeddings=True),
    "olmo, clipped": T.OlmoConfig(**SIZES, clip_qkv=0.5),
    "olmo2": T.Olmo2Config(**SIZES),
    "olmoe": T.OlmoeConfig(**SIZES, **EXPERTS),
    "olmoe, clipped, normalised": T.OlmoeConfig(
        **SIZES, **EXPERTS, norm_topk_prob=True, clip_qkv=0.7
    ),
    "gpt2": T.GPT2Config(**GPT2),
    "gpt2, inner": T.GPT2Config(**GPT2, n_inner=50, tie_word_embeddings=False),
}
