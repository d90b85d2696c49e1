"""OLMo 2: norms after the sublayers only, q/k norms over the full width of the projection."""

from convert.families.family import Family
from convert.families.fields import Fields
from convert.families.key_tables import standard_rules
from convert.families.olmo import read_olmo_config, write_olmo_config
from tptt_jax import ModelConfig

_NORMS = {
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def _read_config(fields: Fields) -> ModelConfig:
    return read_olmo_config(
        fields,
        norm_placement="after",
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        norm_float32=True,
        qk_norm="full",
    )


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=_read_config,
    write_config=lambda config: write_olmo_config(config, "clip_qkv"),
    rules=lambda config: standard_rules(_NORMS),
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
)
