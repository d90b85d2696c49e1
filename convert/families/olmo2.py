"""OLMo 2: norms only after the sublayers, q/k norms over the full width of the projection."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import Fields
from convert.families.gguf_metadata import read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import standard_rules
from convert.families.olmo import read_olmo_config, write_olmo_config
from convert.families.standard import write_old_standard
from convert.formats import GgufFile
from tptt_jax import ModelConfig

_NORMS = {
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_COMMON: dict[str, Any] = {"norm_placement": "after", "norm_float32": True, "qk_norm": "full"}


def _read_config(fields: Fields) -> ModelConfig:
    return read_olmo_config(fields, **_COMMON, norm_eps=fields.number("rms_norm_eps", 1e-5))


def _read_gguf(file: GgufFile) -> ModelConfig:
    return ModelConfig(**read_gguf_common(file), **_COMMON, family="olmo2")


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
