"""Configurations of models and adapters: valid, resolved and refused values."""

import dataclasses

import pytest

from tptt_jax import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import RopeConfig
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
    "activation": ({"activation": "relu"}, "activation must be one of silu.*'relu'"),
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
MAKERS = {
    "model": (ModelConfig.tiny, BAD_MODELS),
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
    [ModelConfig.tiny(), LizaConfig(), LoraConfig(), RopeConfig()],
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
    assert ModelConfig.tiny(head_dim=16, query_scale=0.5).attention_scale == 0.5


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
    norms = (4 if config.norm_placement == "both" else 2) * config.embed_dim
    norms += 2 * config.head_dim if config.qk_norm else 0
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


PER_LAYER = {"num_heads_per_layer": (2, 4, 2), "num_kv_heads_per_layer": (1, 2, 2)}


def test_sizes_that_differ_by_layer():
    config = ModelConfig.tiny(**PER_LAYER, mlp_dim_per_layer=(48, 8, 8))
    assert [config.layer_sizes(i) for i in range(3)] == [(2, 1, 48), (4, 2, 8), (2, 2, 8)]
    one = config.of_layer(2)
    assert (one.num_heads, one.num_kv_heads, one.mlp_dim) == (2, 2, 8)
    assert one.layer_sizes(0) == (2, 2, 8)
    assert [list(each) for each in layer_stacks(config)] == [[0], [1], [2]]
    assert [len(each) for each in layer_stacks(ModelConfig.tiny())] == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_per_layer": (2, 4)}, "num_heads_per_layer has 2 entries"),
        ({"num_heads_per_layer": (2, 2, 2)}, "reach it"),
        ({"mlp_dim_per_layer": (0, 48, 48)}, "between 1 and mlp_dim"),
        ({**PER_LAYER, "num_kv_heads_per_layer": (2, 2, 1), "num_heads": 3}, "between 1 and"),
        ({"num_heads_per_layer": (3, 4, 4)}, "in layer 0 it is not"),
        ({"num_experts": 4}, "experts_per_token must lie between 1 and num_experts"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token"),
        ({"clip_qkv": 0.0}, "clip_qkv must be positive"),
        ({"qk_norm": "both"}, "qk_norm must be one of head, full"),
        ({"norm": "batch"}, "norm must be one of rms, layer"),
        ({"norm_placement": "between"}, "norm_placement must be one of"),
        ({"position_embedding": "alibi"}, "position_embedding must be one of"),
    ],
)
def test_impossible_descriptions(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.tiny(**changes)


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
