"""Configurations of models and adapters: valid, resolved and refused values."""

import copy
import dataclasses
import pickle

import pytest

from tests import shapes
from tptt_jax import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import (
    FLAT_NAMES,
    AttentionConfig,
    ExpertsConfig,
    LayerSizes,
    MlpConfig,
    NormConfig,
    RopeConfig,
    flat_fields,
    flat_settings,
    nest_settings,
)
from tptt_jax.config.flat_names import PARTS
from tptt_jax.decoder import layer_stacks

BAD_MODELS = {
    **{
        f"{name} = 0": ({name: 0}, f"{name} must be at least 1, got 0")
        for name in (
            *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_dim", "sliding_window", "max_positions"),
        )
    },
    "heads": ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of .*3"),
    "odd head": ({"head_dim": 15}, "head_dim must be even.*got 15"),
    "kinds": ({"layer_kinds": ("full",)}, "layer_kinds has 1 entries for num_layers = 3"),
    "kind": ({"layer_kinds": ("full", "wide", "full")}, "one of full, sliding, got 'wide'"),
    "no width": ({"layer_kinds": ("sliding",) * 3}, "sliding_window must say how wide"),
}
BAD_ADAPTERS = {
    "rank": ({"rank": 0}, "rank must be at least 1, got 0"),
    "dropout": ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    "target": ({"targets": ("q_proj", "[")}, r"LoRA target '\[' is not a valid regular expr"),
}
BAD_ROPES = {
    "scaling": (
        {"scaling": "ntk"},
        "one of none, linear, llama3, yarn, dynamic, longrope, got 'ntk'",
    ),
    "theta": ({"theta": 0.0}, "must be positive, got 0.0"),
    "factor": ({"factor": -1.0}, "must be positive, got 10000.0 and -1.0"),
}
BAD_NORMS = {
    "kind": ({"kind": "batch"}, "norm kind must be one of rms, layer, got 'batch'"),
    "placement": ({"placement": "between"}, "norm placement must be one of before, after, both"),
    "eps": ({"eps": 1.0}, r"norm eps must lie in \[0, 1\), got 1.0"),
}
BAD_ATTENTIONS = {
    "qk_norm": ({"qk_norm": "both"}, "attention qk_norm must be one of head, full"),
    "clip": ({"clip_qkv": 0.0}, "attention clip_qkv must be positive or None, got 0.0"),
    "scale": ({"query_scale": (-8) ** -0.5}, "attention query_scale must be positive"),
    "softcap": ({"softcap": float("inf")}, "attention softcap must be positive or None, got inf"),
}
BAD_EXPERTS = {
    "none": ({"number": 4}, r"experts per_token must lie between 1 and their number \(4\), got 0"),
    "more": ({"number": 4, "per_token": 5}, r"number \(4\), got 5"),
    "negative": ({"number": -1}, "experts number must be at least 0, got -1"),
    "many": ({"number": 5000, "per_token": 1}, "experts number must be at most 4096, got 5000"),
}
MAKERS = {
    "model": (ModelConfig.tiny, BAD_MODELS),
    "norm": (NormConfig, BAD_NORMS),
    "attention": (AttentionConfig, BAD_ATTENTIONS),
    "mlp": (MlpConfig, {"activation": ({"activation": "relu"}, "mlp activation.*silu.*'relu'")}),
    "experts": (ExpertsConfig, BAD_EXPERTS),
    "sizes": (LayerSizes, {"none": ({"mlp_dim": (0, 48)}, "per_layer mlp_dim must be at least 1")}),
    "adapter": (LoraConfig, BAD_ADAPTERS),
    "rope": (RopeConfig, BAD_ROPES),
}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        pytest.param(make, *case, id=f"{kind}: {name}")
        for kind, (make, cases) in MAKERS.items()
        for name, case in cases.items()
    ],
)
def test_impossible_values_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "config",
    [
        *(ModelConfig.tiny(), NormConfig(), AttentionConfig(), MlpConfig(), ExpertsConfig()),
        *(LayerSizes(), LizaConfig(), LoraConfig(), RopeConfig()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_configurations_are_frozen_values(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    copy = dataclasses.replace(config)
    assert copy == config
    assert hash(copy) == hash(config)


def test_layer_kinds_default_to_full_and_choose_the_rope():
    config = ModelConfig.tiny()
    assert config.layer_kinds == ("full",) * 3
    assert config.rope_of("sliding") is config.rope
    local = RopeConfig(theta=1e6)
    mixed = ModelConfig.tiny(
        layer_kinds=["sliding", "full", "sliding"], sliding_window=4, sliding_rope=local
    )
    assert mixed.layer_kinds == ("sliding", "full", "sliding")
    assert mixed.rope_of("sliding") is local
    assert mixed.rope_of("full") is mixed.rope


def test_attention_scale():
    assert ModelConfig.tiny(head_dim=16).attention_scale == 0.25
    config = ModelConfig.tiny(attention=AttentionConfig(query_scale=0.5))
    assert config.attention_scale == 0.5


def test_presets_have_the_published_shapes():
    smol, gemma = ModelConfig.smollm2_135m(), ModelConfig.gemma3_270m()
    assert _parameters(smol) == 134_515_008
    assert _parameters(gemma) == 268_098_176
    assert _parameters(ModelConfig.llama3_2_1b()) == 1_235_814_400
    assert [i for i, kind in enumerate(gemma.layer_kinds) if kind == "full"] == [5, 11, 17]
    assert gemma.rope_of("full").theta == 1_000_000
    assert gemma.rope_of("sliding").theta == 10_000


def _parameters(config):
    """Counted by hand, as Hugging Face's cards do."""
    attention = (
        config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    )
    norms = (4 if config.norm.placement == "both" else 2) * config.embed_dim
    norms += 2 * config.head_dim if config.attention.qk_norm else 0
    layer = attention + 3 * config.embed_dim * config.mlp_dim + norms
    return config.vocab_size * config.embed_dim + config.num_layers * layer + config.embed_dim


TARGETS = {
    "last name": ("q_proj", True),
    "whole path": ("self_attn.q_proj", True),
    "regex": (r"self_attn\.[qk]_proj", True),
    "part of a name": ("q_pro", False),
    "part of a path": ("self_attn", False),
    "other": ("k_proj", False),
}


@pytest.mark.parametrize(("target", "hit"), TARGETS.values(), ids=TARGETS)
def test_targets_match_names_or_whole_paths(target, hit):
    config = LoraConfig(targets=[target])
    assert config.targets == (target,)
    assert config.matches("self_attn.q_proj") is hit
    if not hit:
        with pytest.raises(ValueError, match=r"matches no projection; the model has a, self_"):
            config.check_targets(["self_attn.q_proj", "a"])
    else:
        config.check_targets(["self_attn.q_proj", "a"])


def test_adapter_scale():
    assert LoraConfig(rank=4, alpha=16.0).scale == 4.0


def test_sizes_that_differ_by_layer():
    sizes = LayerSizes(num_heads=[2, 4, 2], num_kv_heads=(1, 2, 2), mlp_dim=(48, 8, 8))
    config = ModelConfig.tiny(per_layer=sizes)
    assert config.per_layer.num_heads == (2, 4, 2)
    assert [config.layer_sizes(i) for i in range(3)] == [(2, 1, 48), (4, 2, 8), (2, 2, 8)]
    one = config.of_layer(2)
    assert (one.num_heads, one.num_kv_heads, one.mlp_dim) == (2, 2, 8)
    assert one.layer_sizes(0) == (2, 2, 8)
    assert [list(each) for each in layer_stacks(config)] == [[0], [1], [2]]
    assert [len(each) for each in layer_stacks(ModelConfig.tiny())] == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer": LayerSizes(num_heads=(2, 4))}, "per_layer num_heads has 2 entries"),
        ({"per_layer": LayerSizes(num_heads=(2, 2, 2))}, r"the maximum num_heads \(4\), got"),
        ({"per_layer": LayerSizes(num_heads=(3, 4, 4))}, "in layer 0 it is not"),
        ({"position_embedding": "alibi"}, "position_embedding must be one of"),
        ({"final_softcap": -1.0}, "^final_softcap must be positive or None, got -1.0"),
        ({"mlp": NormConfig()}, r"mlp must be of type MlpConfig, got NormConfig\("),
    ],
)
def test_impossible_descriptions(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.tiny(**changes)


def test_files_have_a_flat_name_for_every_setting():
    """Names and order of version 0.1's config.json and of the fingerprints of its states."""
    assert list(flat_fields(ModelConfig)) == [
        *("family", "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads"),
        *("head_dim", "mlp_dim", "num_heads_per_layer", "num_kv_heads_per_layer"),
        *("mlp_dim_per_layer", "activation", "gated_mlp", "num_experts", "experts_per_token"),
        *("normalize_expert_weights", "norm", "norm_eps", "norm_weight", "norm_bias"),
        *("norm_offset", "norm_float32", "norm_placement", "qk_norm", "clip_qkv", "fused_qkv"),
        *("attention_bias", "attention_out_bias", "mlp_bias", "query_scale"),
        *("attention_softcap", "final_softcap", "scale_embeddings", "tie_embeddings"),
        *("layer_kinds", "sliding_window", "position_embedding", "rope", "sliding_rope"),
        *("max_positions", "bos_token_id", "eos_token_ids", "pad_token_id"),
    ]
    places = {
        (part, field.name) for part, kind in PARTS.items() for field in dataclasses.fields(kind)
    }
    assert sorted(FLAT_NAMES.values()) == sorted(places)
    config = dataclasses.replace(shapes.EXPERTS, per_layer=LayerSizes(mlp_dim=(4, 8)))
    flat = flat_settings(config)
    assert (flat["norm"], flat["num_experts"], flat["clip_qkv"]) == ("rms", 5, 2.0)
    flat["rope"] = RopeConfig(**flat["rope"])
    assert ModelConfig(**nest_settings(flat)) == config


def test_old_flat_names_work_and_say_what_to_write():
    with pytest.warns(DeprecationWarning, match="of ModelConfig is deprecated") as told:
        old = ModelConfig.tiny(norm="layer", norm_eps=1e-5, num_experts=4, experts_per_token=2)
    assert len(told) == 4
    message = (
        "norm_eps of ModelConfig is deprecated: give norm=NormConfig(eps=...) and read "
        "config.norm.eps."
    )
    assert message in {str(each.message) for each in told}
    norm, experts = NormConfig(kind="layer", eps=1e-5), ExpertsConfig(number=4, per_token=2)
    assert old == ModelConfig.tiny(norm=norm, experts=experts)
    with pytest.warns(DeprecationWarning, match=r"read config\.norm\.eps"):
        assert old.norm_eps == 1e-5
    # A part that is given keeps its other settings.
    with pytest.warns(DeprecationWarning, match="norm_bias"):
        assert dataclasses.replace(old, norm_bias=True).norm == dataclasses.replace(norm, bias=True)


def test_unknown_names_are_refused():
    config = ModelConfig.tiny()
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        ModelConfig.tiny(heads=3)
    with pytest.raises(AttributeError, match="ModelConfig has no field heads"):
        _ = config.heads
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        ("q_proj", {"self_attn.qkv_proj"}),
        ("v_proj", {"self_attn.qkv_proj"}),
        ("qkv_proj", {"self_attn.qkv_proj"}),
        ("out_proj", {"self_attn.o_proj"}),
        (r"self_attn\.(out|o)_proj", {"self_attn.o_proj"}),
        (r".*\.up_proj", {"mlp.up_proj"}),
        ("proj", set()),
    ],
)
def test_targets_by_the_names_that_families_use(target, paths):
    lora = LoraConfig(targets=(target,))
    known = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj"}
    assert {path for path in known if lora.matches(path)} == paths
