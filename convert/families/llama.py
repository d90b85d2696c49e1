"""Llama, and everything published under its model type (SmolLM2, TinyLlama, ...)."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import Fields
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.rotary import recognise_llama3
from convert.families.standard import (
    read_attention,
    read_standard,
    write_old_standard,
    write_standard,
)
from convert.formats import GgufFile
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, MlpConfig


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", ("silu", "swish"), "silu")
    return read_standard(
        fields,
        max_positions=2048,
        attention=read_attention(fields),
        mlp=MlpConfig(bias=fields.boolean("mlp_bias", False)),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_standard(config),
        "attention_bias": config.attention.bias,
        "mlp_bias": config.mlp.bias,
    }


def _read_gguf(file: GgufFile) -> ModelConfig:
    common = read_gguf_common(file)
    if "rope_freqs.weight" in file.tensors:
        divisors, theta = file.read("rope_freqs.weight"), common["rope"].theta
        common["rope"] = recognise_llama3(divisors, theta, common["head_dim"])
    return ModelConfig(
        **common,
        family="llama",
        attention=AttentionConfig(
            bias="blk.0.attn_q.bias" in file.tensors,
            out_bias="blk.0.attn_output.bias" in file.tensors,
        ),
        mlp=MlpConfig(bias="blk.0.ffn_up.bias" in file.tensors),
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(),
    write_old_config=write_old_standard,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    gguf=GgufTable(
        architecture="llama",
        read_config=_read_gguf,
        rules=lambda config: gguf_rules(config, interleaved=True),
        ignored=(r"rope_freqs\.weight",),
    ),
)
