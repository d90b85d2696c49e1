"""Gemma 3, text only (model type "gemma3_text")."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import (
    Fields,
    read_layer_kinds,
    read_sizes,
    write_layer_kinds,
    write_sizes,
)
from convert.families.gguf_metadata import metadata_reader, read_gguf_sizes
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.rotary import (
    read_gguf_rope,
    read_rope,
    shortest,
    write_old_rope,
    write_rope,
)
from convert.families.standard import read_attention
from convert.formats import GgufFile
from convert.rules import MINUS_ONE
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, BaseLayerKind, MlpConfig, NormConfig, RopeConfig

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_COMMON: dict[str, Any] = {
    "mlp": MlpConfig(activation="gelu_tanh"),
    "scale_embeddings": True,
}
_SLIDING_THETA = 10_000.0
# llama.cpp has no metadata for the query scale: it recognises the 27B model, the only one that
# scales by a width other than head_dim, by its depth.
_LAYERS_OF_27B = 62


def _norm(eps: float) -> NormConfig:
    return NormConfig(eps=eps, offset=True, placement="both")


def _pattern(num_layers: int, period: int) -> tuple[BaseLayerKind, ...]:
    return tuple("sliding" if (i + 1) % period else "full" for i in range(num_layers))


def _read_ropes(fields: Fields, positions: int) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of full and of sliding layers, from either form."""
    theta = fields.number("rope_theta", 1_000_000.0)
    local = fields.number("rope_local_base_freq", _SLIDING_THETA)
    parameters = fields.object("rope_parameters")
    full = parameters.object("full_attention")
    if not full.raw:
        full = fields.object("rope_scaling")
    sliding = parameters.object("sliding_attention")
    for each in (full, sliding):
        # transformers looks for it next to the layer kinds, so it never applies.
        each.require("truncate", (None, True), None)
    return read_rope(full, theta, positions), read_rope(sliding, local, positions)


def _read_config(fields: Fields) -> ModelConfig:
    fields.require("hidden_activation", ("gelu_pytorch_tanh", None), None)
    fields.require("use_bidirectional_attention", (False, None), None)
    # transformers reads this setting but never applies it; no published model has it.
    fields.require("attn_logit_softcapping", (None,), None)
    sizes = read_sizes(fields)
    sizes |= {"head_dim": fields.integer("head_dim", 256), "norm": _norm(sizes["norm"].eps)}
    positions = fields.integer("max_position_embeddings", 131_072)
    rope, sliding_rope = _read_ropes(fields, positions)
    period = max(1, fields.integer("sliding_window_pattern", 6))
    return ModelConfig(
        **sizes,
        **_COMMON,
        attention=read_attention(
            fields,
            qk_norm="head",
            query_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        ),
        final_softcap=fields.number("final_logit_softcapping", None),
        tie_embeddings=fields.boolean("tie_word_embeddings", True),
        layer_kinds=read_layer_kinds(fields, _pattern(sizes["num_layers"], period)),
        sliding_window=fields.integer("sliding_window", 4096),
        rope=rope,
        sliding_rope=sliding_rope,
        max_positions=positions,
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    positions = config.max_positions
    return {
        **write_sizes(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention.bias,
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.final_softcap,
        "layer_types": write_layer_kinds(config),
        "sliding_window": config.sliding_window,
        "rope_parameters": {
            "full_attention": write_rope(config.rope, positions),
            "sliding_attention": write_rope(config.rope_of("sliding"), positions),
        },
    }


def _write_old_config(config: ModelConfig) -> dict[str, Any]:
    content = write_old_rope(config.rope, config.max_positions)
    content["rope_local_base_freq"] = config.rope_of("sliding").theta
    # transformers 4.50 to 4.52 have no layer_types.
    period = next((i + 1 for i, kind in enumerate(config.layer_kinds) if kind == "full"), None)
    if period is not None and config.layer_kinds == _pattern(config.num_layers, period):
        content["sliding_window_pattern"] = period
    return content


def _read_gguf(file: GgufFile) -> ModelConfig:
    get = metadata_reader(file)
    sizes = read_gguf_sizes(file)
    queries = sizes["head_dim"]
    if sizes["num_layers"] == _LAYERS_OF_27B:
        queries = sizes["embed_dim"] // sizes["num_heads"]
    return ModelConfig(
        **sizes,
        **_COMMON,
        family="gemma3_text",
        norm=_norm(shortest(get("attention.layer_norm_rms_epsilon"))),
        attention=AttentionConfig(qk_norm="head", query_scale=queries**-0.5),
        final_softcap=get("final_logit_softcapping", None),
        layer_kinds=_pattern(sizes["num_layers"], 6),
        sliding_window=get("attention.sliding_window"),
        rope=read_gguf_rope(get, 1_000_000.0),
        sliding_rope=RopeConfig(theta=shortest(get("rope.freq_base_swa", _SLIDING_THETA))),
    )


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=lambda config: standard_rules(_NORMS),
    write_old_config=_write_old_config,
    superseded=(
        *("rope_theta", "rope_scaling", "rope_local_base_freq"),
        *("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    ignored=(r"lm_head\.weight",),
    gguf=GgufTable(
        architecture="gemma3",
        read_config=_read_gguf,
        rules=lambda config: gguf_rules(config, norm=MINUS_ONE),
    ),
)
