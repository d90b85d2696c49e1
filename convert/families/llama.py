"""Llama, and everything published under its model type (SmolLM2, TinyLlama, ...)."""

from typing import Any

from convert.errors import ConversionError
from convert.families.family import Family, GgufTable
from convert.families.fields import Fields, read_sizes, write_sizes
from convert.families.gguf_metadata import metadata_reader, read_gguf_sizes
from convert.families.key_tables import TARGET, standard_rules
from convert.families.rotary import (
    read_flat_rope,
    read_gguf_rope,
    recognise_llama3,
    shortest,
    write_rope,
)
from convert.gguf_io import GgufFile
from convert.rules import TRANSPOSE, Rule, interleaved_rotary, linear
from tptt_jax import ModelConfig


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu", "swish"), "silu")
    positions = fields.integer("max_position_embeddings", 2048)
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **read_sizes(fields),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=read_flat_rope(fields, 10_000.0, positions),
        max_positions=positions,
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": write_rope(config.rope),
    }


def _read_gguf(file: GgufFile) -> ModelConfig:
    get = metadata_reader(file)
    sizes = read_gguf_sizes(file)
    if get("rope.dimension_count", sizes["head_dim"]) != sizes["head_dim"]:
        raise ConversionError(
            f"{file.path} rotates only a part of each head, which is unsupported."
        )
    rope = read_gguf_rope(get, 10_000.0)
    if "rope_freqs.weight" in file.tensors:
        rope = recognise_llama3(file.read("rope_freqs.weight"), rope.theta, sizes["head_dim"])
    return ModelConfig(
        **sizes,
        family="llama",
        norm_eps=shortest(get("attention.layer_norm_rms_epsilon")),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        rope=rope,
    )


def _gguf_rules(config: ModelConfig) -> tuple[Rule, ...]:
    q_order = interleaved_rotary(config.num_heads)
    k_order = interleaved_rotary(config.num_kv_heads)
    q, k = f"{TARGET}self_attn.q_proj", f"{TARGET}self_attn.k_proj"
    return (
        Rule("token_embd.weight", "embed.embedding"),
        Rule("blk.{layer}.attn_q.weight", f"{q}.kernel", q_order.then(TRANSPOSE)),
        Rule("blk.{layer}.attn_q.bias", f"{q}.bias", q_order),
        Rule("blk.{layer}.attn_k.weight", f"{k}.kernel", k_order.then(TRANSPOSE)),
        Rule("blk.{layer}.attn_k.bias", f"{k}.bias", k_order),
        *linear("blk.{layer}.attn_v", f"{TARGET}self_attn.v_proj"),
        *linear("blk.{layer}.attn_output", f"{TARGET}self_attn.o_proj"),
        *linear("blk.{layer}.ffn_gate", f"{TARGET}mlp.gate_proj"),
        *linear("blk.{layer}.ffn_up", f"{TARGET}mlp.up_proj"),
        *linear("blk.{layer}.ffn_down", f"{TARGET}mlp.down_proj"),
        Rule("blk.{layer}.attn_norm.weight", f"{TARGET}attn_norm.weight"),
        Rule("blk.{layer}.ffn_norm.weight", f"{TARGET}mlp_norm.weight"),
        Rule("output_norm.weight", "final_norm.weight"),
        Rule("output.weight", "lm_head.kernel", TRANSPOSE),
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    gguf=GgufTable(
        architecture="llama",
        read_config=_read_gguf,
        rules=_gguf_rules,
        ignored=(r"rope_freqs\.weight",),
    ),
)
