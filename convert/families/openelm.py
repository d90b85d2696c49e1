"""OpenELM: heads and MLP width differ by layer, one projection for queries, keys and values."""

import math
from typing import Any

from convert.errors import ConversionError
from convert.families.family import Family
from convert.families.fields import Fields, read_token_ids, write_token_ids
from convert.rules import TRANSPOSE, Rule, linear, split
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, LayerSizes, MlpConfig, RopeConfig

_SOURCE = "transformer.layers.{layer}."
_TARGET = "layers.{layer}."


def _mlp_dim(multiplier: float, embed_dim: int, divisor: int) -> int:
    """The width for a multiplier, as in the original code: a multiple of `divisor`."""
    exact = multiplier * embed_dim
    width = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return width if width >= 0.9 * exact else width + divisor


def _read_mlp_dims(fields: Fields, embed_dim: int, num_layers: int) -> tuple[int, ...]:
    multipliers = fields.raw.get("ffn_multipliers")
    if (
        not isinstance(multipliers, list)
        or len(multipliers) != num_layers
        or not all(type(x) in (int, float) and 0 < x < 1e6 for x in multipliers)
    ):
        raise ConversionError(
            f"ffn_multipliers in {fields.origin} must be a list of {num_layers} positive numbers, "
            f"it is {multipliers!r:.200}."
        )
    divisor = fields.integer("ffn_dim_divisor", 256)
    if divisor < 1:
        raise ConversionError(f"ffn_dim_divisor in {fields.origin} must be positive.")
    return tuple(_mlp_dim(multiplier, embed_dim, divisor) for multiplier in multipliers)


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("activation_fn_name", ("swish", "silu"), "swish")
    fields.require("normalization_layer_name", ("rms_norm",), "rms_norm")
    num_layers, embed_dim = fields.integer("num_transformer_layers"), fields.integer("model_dim")
    heads, kv_heads = fields.integers("num_query_heads"), fields.integers("num_kv_heads")
    mlp_dims = _read_mlp_dims(fields, embed_dim, num_layers)
    return ModelConfig(
        family=fields.text("model_type"),
        vocab_size=fields.integer("vocab_size"),
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=max(heads, default=0),
        num_kv_heads=max(kv_heads, default=0),
        head_dim=fields.integer("head_dim"),
        mlp_dim=max(mlp_dims),
        per_layer=LayerSizes(num_heads=heads, num_kv_heads=kv_heads, mlp_dim=mlp_dims),
        mlp=MlpConfig(gated=fields.boolean("ffn_with_glu", True)),
        attention=AttentionConfig(
            fused_qkv=True,
            qk_norm="head" if fields.boolean("normalize_qk_projections", True) else None,
        ),
        tie_embeddings=fields.boolean("share_input_output_layers", True),
        rope=RopeConfig(theta=fields.number("rope_freq_constant", 10_000.0)),
        max_positions=fields.integer("max_context_length", 2048),
        **read_token_ids(fields),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    sizes = [config.layer_sizes(layer) for layer in range(config.num_layers)]
    heads, kv_heads, mlp_dims = (list(column) for column in zip(*sizes, strict=True))
    return {
        "vocab_size": config.vocab_size,
        "model_dim": config.embed_dim,
        "num_transformer_layers": config.num_layers,
        "head_dim": config.head_dim,
        "num_query_heads": heads,
        "num_kv_heads": kv_heads,
        "num_gqa_groups": heads[0] // kv_heads[0],
        "ffn_multipliers": [width / config.embed_dim for width in mlp_dims],
        "ffn_dim_divisor": math.gcd(*mlp_dims),
        "ffn_with_glu": config.mlp.gated,
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": config.attention.qk_norm is not None,
        "share_input_output_layers": config.tie_embeddings,
        # The original code reads its own name; transformers' loading looks for this one.
        "tie_word_embeddings": config.tie_embeddings,
        "rope_freq_constant": config.rope.theta,
        "rope_max_length": 2 * config.max_positions,
        "max_context_length": config.max_positions,
        **write_token_ids(config),
    }


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    def norm(source: str, target: str) -> Rule:
        return Rule(f"{_SOURCE}{source}.weight", f"{_TARGET}{target}.weight")

    up = f"{_TARGET}mlp.up_proj.kernel"
    if config.mlp.gated:
        gate_and_up = (f"{_TARGET}mlp.gate_proj.kernel", up)
        first = Rule(f"{_SOURCE}ffn.proj_1.weight", gate_and_up, split(0).then(TRANSPOSE))
    else:
        first = Rule(f"{_SOURCE}ffn.proj_1.weight", up, TRANSPOSE)
    return (
        Rule("transformer.token_embeddings.weight", "embed.embedding"),
        *linear(f"{_SOURCE}attn.qkv_proj", f"{_TARGET}self_attn.qkv_proj"),
        *linear(f"{_SOURCE}attn.out_proj", f"{_TARGET}self_attn.o_proj"),
        norm("attn.q_norm", "self_attn.q_norm"),
        norm("attn.k_norm", "self_attn.k_norm"),
        first,
        *linear(f"{_SOURCE}ffn.proj_2", f"{_TARGET}mlp.down_proj"),
        norm("attn_norm", "attn_norm"),
        norm("ffn_norm", "mlp_norm"),
        Rule("transformer.norm.weight", "final_norm.weight"),
        Rule("lm_head.weight", "lm_head.kernel", TRANSPOSE),
    )


FAMILY = Family(
    model_type="openelm",
    architecture="OpenELMForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    superseded=("qkv_multipliers",),
    # In untied models the original code creates a classifier beside lm_head and never uses it.
    ignored=(r"lm_head\.weight", r"transformer\.classifier\.weight"),
    prefix="transformer.",
)
