"""OLMoE: a mixture of experts, q/k norms over the full width of the projection."""

from typing import Any

from convert.families.family import Family, GgufTable
from convert.families.fields import Fields
from convert.families.gguf_metadata import metadata_reader, read_gguf_common
from convert.families.gguf_tables import gguf_rules
from convert.families.key_tables import (
    PRE_NORMS,
    attention_rules,
    expert_rules,
    norm_rules,
    outer_rules,
)
from convert.families.olmo import read_olmo_config, write_olmo_config
from convert.families.standard import write_old_standard
from convert.formats import GgufFile
from convert.rules import Rule
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, ExpertsConfig, NormConfig


def _read_config(fields: Fields) -> ModelConfig:
    return read_olmo_config(
        fields,
        qk_norm="full",
        norm=NormConfig(eps=fields.number("rms_norm_eps", 1e-5)),
        experts=ExpertsConfig(
            number=fields.integer("num_experts", 64),
            per_token=fields.integer("num_experts_per_tok", 8),
            normalize_weights=fields.boolean("norm_topk_prob", False),
        ),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_olmo_config(config),
        "num_experts": config.experts.number,
        "num_experts_per_tok": config.experts.per_token,
        "norm_topk_prob": config.experts.normalize_weights,
    }


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*outer_rules(), *attention_rules(), *expert_rules(), *norm_rules(PRE_NORMS))


def _read_gguf(file: GgufFile) -> ModelConfig:
    get = metadata_reader(file)
    return ModelConfig(
        **read_gguf_common(file),
        family="olmoe",
        attention=AttentionConfig(qk_norm="full"),
        experts=ExpertsConfig(number=get("expert_count"), per_token=get("expert_used_count")),
    )


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rules=_rules,
    write_old_config=write_old_standard,
    superseded=("rope_theta", "rope_scaling"),
    ignored=(r"lm_head\.weight",),
    gguf=GgufTable(architecture="olmoe", read_config=_read_gguf, rules=gguf_rules),
)
