"""OLMo 2: norms only after the sublayers, q/k norms over the full width of the projection."""

from convert.families.family import Family, GgufTable
from convert.families.fields import Fields
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.olmo import read_olmo_config, write_olmo_config
from convert.families.standard import write_old_standard
from convert.formats import GgufFile
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, NormConfig

_NORMS = {
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def _norm(eps: float) -> NormConfig:
    return NormConfig(eps=eps, float32=True, placement="after")


def _read_config(fields: Fields) -> ModelConfig:
    norm = _norm(fields.number("rms_norm_eps", 1e-5))
    return read_olmo_config(fields, qk_norm="full", norm=norm)


def _read_gguf(file: GgufFile) -> ModelConfig:
    common = read_gguf_common(file)
    common |= {"norm": _norm(common["norm"].eps), "attention": AttentionConfig(qk_norm="full")}
    return ModelConfig(**common, family="olmo2")


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=_read_config,
    write_config=lambda config: write_olmo_config(config, "clip_qkv"),
    rules=lambda config: standard_rules(_NORMS),
    write_old_config=write_old_standard,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
    gguf=GgufTable(architecture="olmo2", read_config=_read_gguf, rules=gguf_rules),
)
