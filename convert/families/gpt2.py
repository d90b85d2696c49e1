"""GPT-2: LayerNorm with biases, learned positions, one stored matrix for q, k and v."""

from typing import Any

from convert.families.family import Family
from convert.families.fields import Fields, write_token_ids
from convert.rules import TRANSPOSE, Rule
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, MlpConfig, NormConfig

_SOURCE = "transformer.h.{layer}."
_TARGET = "layers.{layer}."


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    fields.require("scale_attn_weights", (True,), True)
    fields.require("scale_attn_by_inverse_layer_idx", (False,), False)
    fields.require("reorder_and_upcast_attn", (False,), False)
    fields.require("add_cross_attention", (False,), False)
    embed, heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
    return ModelConfig(
        family=fields.text("model_type"),
        vocab_size=fields.integer("vocab_size", 50_257),
        embed_dim=embed,
        num_layers=fields.integer("n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed // max(heads, 1),
        mlp_dim=fields.integer("n_inner", 4 * embed),
        mlp=MlpConfig(activation="gelu_tanh", gated=False, bias=True),
        norm=NormConfig(kind="layer", bias=True, eps=fields.number("layer_norm_epsilon", 1e-5)),
        attention=AttentionConfig(fused_qkv=True, bias=True, out_bias=True),
        position_embedding="learned",
        tie_embeddings=fields.boolean("tie_word_embeddings", True),
        max_positions=fields.integer("n_positions", fields.integer("n_ctx", 1024)),
        bos_token_id=fields.integer("bos_token_id", None),
        eos_token_ids=fields.token_ids("eos_token_id"),
        pad_token_id=fields.integer("pad_token_id", None),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.mlp_dim == 4 * config.embed_dim else config.mlp_dim,
        "n_positions": config.max_positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }


def _affine(source: str, target: str, ours: str) -> tuple[Rule, Rule]:
    """Weight and bias; Conv1D stores its weight [in, out], as we do."""
    return (
        Rule(f"{source}.weight", f"{target}.{ours}"),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (
        Rule("transformer.wte.weight", "embed.embedding"),
        Rule("transformer.wpe.weight", "embed.positions"),
        *_affine(f"{_SOURCE}attn.c_attn", f"{_TARGET}self_attn.qkv_proj", "kernel"),
        *_affine(f"{_SOURCE}attn.c_proj", f"{_TARGET}self_attn.o_proj", "kernel"),
        *_affine(f"{_SOURCE}mlp.c_fc", f"{_TARGET}mlp.up_proj", "kernel"),
        *_affine(f"{_SOURCE}mlp.c_proj", f"{_TARGET}mlp.down_proj", "kernel"),
        *_affine(f"{_SOURCE}ln_1", f"{_TARGET}attn_norm", "weight"),
        *_affine(f"{_SOURCE}ln_2", f"{_TARGET}mlp_norm", "weight"),
        *_affine("transformer.ln_f", "final_norm", "weight"),
        Rule("lm_head.weight", "lm_head.kernel", TRANSPOSE),
    )


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    # llama.cpp's converter reads this one.
    write_old_config=lambda config: {"n_ctx": config.max_positions},
    superseded=("n_ctx",),
    # Causal masks that old versions of transformers saved with the weights.
    ignored=(r".*\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    prefix="transformer.",
)
