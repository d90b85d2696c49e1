"""What the configurations accept, resolve and refuse."""

import dataclasses

import pytest

from tptt_jax import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import OPERATORS, RopeConfig
from tptt_jax.decoder import layer_stacks

# (num_householder, trick, beta_gate, alpha_gate, state_activation), from the paper's table.
PAPER = {
    "delta_rule": (1, "derivative", "k", "constant", "none"),
    "delta_rule_v": (1, "derivative", "v", "constant", "none"),
    "delta_rule_kv": (1, "derivative", "kv", "constant", "none"),
    "delta_rule_gelu": (1, "derivative", "k", "constant", "gelu"),
    "gated_delta_rule": (1, "derivative", "k", "k", "none"),
    "delta_product": (2, "derivative", "k", "constant", "none"),
    "delta_product_r": (2, "rotary", "k", "constant", "none"),
    "delta_product_c": (2, "combined", "k", "constant", "none"),
    "gated_delta_product": (2, "derivative", "k", "k", "none"),
}
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
BAD_MEMORIES = {
    **{
        f"{name} = {value}": ({name: value}, f"{name} must be one of .*, got '{value}'")
        for name, value in (
            *(("operator", "delta"), ("trick", "integral"), ("beta_gate", "q")),
            *(("alpha_gate", "q"), ("mag", "fixed"), ("linear_scale", "rms")),
            *(("state_activation", "relu"), ("precision", "half")),
        )
    },
    **{
        f"{name} = {value}": ({name: value}, f"{name} must be at least {value + 1}, got {value}")
        for name, value in (
            *(("num_householder", 0), ("chunk_size", 0), ("softmax_window", 0)),
            *(("softmax_sinks", -1), ("memory_rank", -1)),
        )
    },
    **{
        f"mag_init = {value}": ({"mag_init": value}, "mag_init must lie strictly between 0 and 1")
        for value in (0.0, 1.0, -0.1, float("nan"))
    },
    **{
        f"dropout = {value}": ({"dropout": value}, r"dropout must lie in \[0, 1\)")
        for value in (1.0, -0.1, float("nan"))
    },
    "scheduled share": ({"mag": "scheduled", "mag_init": 1.1}, "between 0 and 1, got 1.1"),
    "gates of the reference": (
        {"operator": "tptt_reference", "vector_beta": True},
        "has gates of its own kind",
    ),
    "nothing to cross": ({"softmax": False, "cross_gate": True}, "use cross_gate=False"),
}
BAD_ADAPTERS = {
    "rank": ({"rank": 0}, "rank must be at least 1, got 0"),
    "dropout": ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    "target": ({"targets": ("q_proj", "[")}, r"LoRA target '\[' is not a valid regular expr"),
}
BAD_ROPES = {
    "scaling": ({"scaling": "yarn"}, "one of none, linear, llama3, got 'yarn'"),
    "theta": ({"theta": 0.0}, "must be positive, got 0.0"),
    "factor": ({"factor": -1.0}, "must be positive, got 10000.0 and -1.0"),
}
MAKERS = {
    "model": (ModelConfig.tiny, BAD_MODELS),
    "memory": (LizaConfig, BAD_MEMORIES),
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


@pytest.mark.parametrize("operator", PAPER)
def test_operators_set_what_the_paper_says(operator):
    assert set(OPERATORS) == set(PAPER)
    assert _resolved(LizaConfig(operator=operator)) == PAPER[operator]


def _resolved(config):
    names = ("num_householder", "trick", "beta_gate", "alpha_gate", "state_activation")
    return tuple(getattr(config, name) for name in names)


def test_the_caller_overrides_the_operator():
    config = LizaConfig(operator="delta_rule_v", num_householder=3, trick="rotary", alpha_gate="kv")
    assert _resolved(config) == (3, "rotary", "v", "kv", "none")
    assert config.recurrence.num_householder == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [("delta_rule_gelu", "delta_product_c"), ("delta_product_c", "delta_rule_gelu")],
)
def test_with_operator_leaves_nothing_of_the_old_one(before, after):
    config = LizaConfig(operator=before, mag_init=0.3, softmax_window=7)
    changed = config.with_operator(after)
    assert changed == LizaConfig(operator=after, mag_init=0.3, softmax_window=7)
    assert _resolved(changed) == PAPER[after]
    assert config.operator == before


@pytest.mark.parametrize("mode", PAPER)
def test_modes_of_the_reference_operator(mode):
    config = LizaConfig.tptt_reference(mode, mag_init=1.0)
    assert config.operator == "tptt_reference"
    assert (config.mag, config.mag_init, config.linear_scale) == ("scheduled", 1.0, "unit")
    assert _resolved(config) == PAPER[mode]
    assert _resolved(LizaConfig.tptt_reference(mode, num_householder=3)) == (3, *PAPER[mode][1:])


def test_an_unknown_mode_of_the_reference_operator():
    with pytest.raises(ValueError, match=r"mode must be one of delta_rule, .*, got 'tptt'"):
        LizaConfig.tptt_reference("tptt")


def test_a_linear_model_has_unit_scale():
    assert LizaConfig(softmax=False).linear_scale == "unit"
    assert LizaConfig(softmax=False, linear_scale="match").linear_scale == "unit"


def test_the_papers_recipe():
    config = LizaConfig.paper()
    assert (config.mag, config.mag_init, config.linear_scale) == ("scheduled", 0.01, "unit")
    assert LizaConfig.paper(mag_init=0.2, operator="delta_rule").mag_init == 0.2
    default = LizaConfig()
    assert (default.mag, default.mag_init, default.linear_scale) == ("learned", 0.05, "match")
    assert (default.softmax_sinks, default.operator) == (4, "delta_product")


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
