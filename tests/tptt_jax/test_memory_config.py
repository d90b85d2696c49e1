"""The memory's configuration: valid, resolved and refused values."""

import copy
import dataclasses
import json
import pickle

import pytest
import yaml

from tptt_jax import LizaConfig, ModelConfig
from tptt_jax.config import OPERATORS, layer_kinds, memory_layers, runs_memory

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
BAD_MEMORIES = {
    **{
        f"{name} = {value}": ({name: value}, f"{name} must be one of .*, got '{value}'")
        for name, value in (
            *(("writes", "some"), ("operator", "delta"), ("trick", "integral"), ("beta_gate", "q")),
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
        f"mag_init = {value}": (
            {"mag": "learned", "mag_init": value},
            "mag_init must lie strictly between 0 and 1",
        )
        for value in (0.0, 1.0, -0.1, float("nan"))
    },
    **{
        f"dropout = {value}": ({"dropout": value}, r"dropout must lie in \[0, 1\)")
        for value in (1.0, -0.1, float("nan"))
    },
    "scheduled share": ({"mag": "scheduled", "mag_init": 1.1}, "between 0 and 1, got 1.1"),
    **{
        f"{name} of the reference": (
            {"writes": "all", "operator": "tptt_reference", name: value},
            "has gates of its own kind",
        )
        for name, value in (
            *(("vector_beta", True), ("expand_gates", True)),
            *(("beta_gate", "projected"), ("alpha_gate", "projected")),
        )
    },
    **{
        f"the reference, {writes}": (
            {"writes": writes, "operator": "tptt_reference", "beta_gate": "k", "alpha_gate": "k"},
            'writes every token: use writes="all"',
        )
        for writes in ("evicted", "none")
    },
    "nothing to cross": (
        {"writes": "all", "softmax": False, "cross_gate": True},
        "use cross_gate=False",
    ),
    **{
        f"no window to leave, {writes}": (
            {"writes": writes, "softmax": False},
            'no window from which tokens could be evicted: use writes="all"',
        )
        for writes in ("evicted", "none")
    },
    **{
        f"{name} = {value} of every token": (
            {"writes": "all", name: value},
            f'{name}="{value}" measures the memory against evicted tokens: use writes="evicted"',
        )
        for name, value in (("mag", "mass"), ("linear_scale", "learned"))
    },
    "mass of every token, no softmax": (
        {"writes": "all", "softmax": False, "mag": "mass"},
        'use writes="evicted"',
    ),
    **{
        f"{name} with evicted writes": ({name: value}, 'mix a memory of every token: use writes="')
        for name, value in (("cross_gate", True), ("linear_scale", "projected"))
    },
    **{
        f"{name} with projected gates": ({name: True}, 'one gate per head and step.*beta_gate="k"')
        for name in ("vector_beta", "expand_gates")
    },
    "a horizon of nothing": ({"horizon": 0}, "horizon must be at least 1, got 0"),
    "a horizon of every token": (
        {"writes": "all", "horizon": 9},
        'writes="all" has none of these: leave it out, or use writes="evicted"',
    ),
    "a full layer below 0": ({"full_layers": (1, -1)}, "counted from 0, got -1"),
    "a full layer that is no number": ({"full_layers": (True,)}, "counted from 0, got True"),
    "a full layer twice": ({"full_layers": (3, 1, 3)}, "names layer 3 more than once: name it"),
    "full layers of no softmax": (
        {"writes": "all", "softmax": False, "full_layers": (0,)},
        "leaves no softmax attention to keep in full_layers: use softmax=True",
    ),
    "shares beyond 1": ({"mag_init": 1.5}, "between 0 and 1, got 1.5"),
}


@pytest.mark.parametrize(("options", "message"), BAD_MEMORIES.values(), ids=BAD_MEMORIES)
def test_impossible_memories_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LizaConfig(**options)


@pytest.mark.parametrize("operator", PAPER)
def test_operators_set_what_the_paper_says(operator):
    assert set(OPERATORS) == set(PAPER)
    assert _resolved(LizaConfig(writes="all", operator=operator)) == PAPER[operator]


def _resolved(config):
    names = ("num_householder", "trick", "beta_gate", "alpha_gate", "state_activation")
    return tuple(getattr(config, name) for name in names)


@pytest.mark.parametrize("writes", ["evicted", "none"])
@pytest.mark.parametrize("operator", PAPER)
def test_gates_from_keys_become_projected_gates(operator, writes):
    """The operator says whether there is a gate; values and constants stay what they are."""
    steps, trick, beta, alpha, activation = PAPER[operator]
    beta, alpha = ("projected" if gate == "k" else gate for gate in (beta, alpha))
    config = LizaConfig(writes=writes, operator=operator)
    assert _resolved(config) == (steps, trick, beta, alpha, activation)
    asked = LizaConfig(writes=writes, operator=operator, beta_gate="k", alpha_gate="k")
    assert _resolved(asked) == (steps, trick, "k", "k", activation)


WRITES = {
    "evicted": ("gated_delta_rule", "mass", "learned", 16),
    "all": ("delta_product", "learned", "match", 0),
    "none": ("gated_delta_rule", "mass", "learned", 0),
}


@pytest.mark.parametrize(("writes", "resolved"), WRITES.items(), ids=WRITES)
def test_writes_set_the_other_options(writes, resolved):
    names = ("operator", "mag", "linear_scale", "memory_rank")
    config = LizaConfig(writes=writes)
    assert tuple(getattr(config, name) for name in names) == resolved
    asked = {"operator": "delta_rule", "mag": "scheduled", "linear_scale": "unit", "memory_rank": 3}
    config = LizaConfig(writes=writes, **asked)
    assert {name: getattr(config, name) for name in names} == asked


def test_the_default_is_the_memory_of_what_the_window_has_lost():
    config = LizaConfig()
    assert config == LizaConfig(writes="evicted")
    assert _resolved(config) == (1, "derivative", "projected", "projected", "none")
    assert (config.softmax, config.softmax_window, config.softmax_sinks) == (True, None, 4)
    assert (config.memory_rank, config.memory_alpha, config.chunk_size) == (16, 16.0, 64)
    assert not any((config.vector_beta, config.expand_gates, config.cross_gate))
    assert (config.dropout, config.precision) == (0.0, "auto")


def test_named_is_the_default_memory_with_another_operator():
    config = LizaConfig.named("gated_delta_product", softmax_window=9)
    assert config == LizaConfig(operator="gated_delta_product", softmax_window=9)
    assert (config.writes, config.mag, config.num_householder) == ("evicted", "mass", 2)
    assert LizaConfig.named("delta_rule", writes="all") == LizaConfig(
        writes="all", operator="delta_rule"
    )


MIXED = ModelConfig.tiny(layer_kinds=("sliding", "full", "sliding"), sliding_window=4)
# Layers of MIXED that have a memory, and whether it ever holds a token.
MEMORIES = {
    "no liza": (None, (), False),
    "evicted, window": (LizaConfig(softmax_window=5), (1,), True),
    "evicted, no window": (LizaConfig(), (1,), False),
    "all": (LizaConfig(writes="all"), (0, 1, 2), True),
    "all, window": (LizaConfig(writes="all", softmax_window=5), (0, 1, 2), True),
    "none": (LizaConfig(writes="none", softmax_window=5), (), False),
}


@pytest.mark.parametrize(("liza", "layers", "runs"), MEMORIES.values(), ids=MEMORIES)
def test_layers_that_have_a_memory(liza, layers, runs):
    assert memory_layers(MIXED, liza) == layers
    assert runs_memory(MIXED, liza) is runs
    if liza is not None:
        kinds = MIXED.layer_kinds
        assert layers == tuple(i for i in range(3) if liza.has_memory(kinds[i]))
        assert {kind for kind in kinds if liza.runs_memory(kind)} == (
            {kinds[i] for i in layers} if runs else set()
        )


BASE = ModelConfig.tiny(
    layer_kinds=("sliding", "full", "full", "full"), num_layers=4, sliding_window=4
)


@pytest.mark.parametrize(("writes", "layers"), [("evicted", (2,)), ("all", (0, 2)), ("none", ())])
def test_full_layers_stay_what_they_are_in_the_base_model(writes, layers):
    liza = LizaConfig(writes=writes, softmax_window=5, full_layers=[3, 1])
    assert liza == LizaConfig(writes=writes, softmax_window=5, full_layers=(1, 3))
    assert json.loads(json.dumps(dataclasses.asdict(liza)))["full_layers"] == [1, 3]
    assert layer_kinds(BASE, liza) == ("sliding", "kept", "full", "kept")
    assert memory_layers(BASE, liza) == layers
    assert layer_kinds(BASE, LizaConfig()) == layer_kinds(BASE, None) == BASE.layer_kinds
    with pytest.raises(ValueError, match="each of layer_kinds must be one of full, sliding"):
        dataclasses.replace(BASE, layer_kinds=layer_kinds(BASE, liza))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4,), "names layer 4, but the model has 4 layers, counted from 0"),
        ((2, 0), "names layer 0, which the base model windows itself.* that have: 1, 2, 3"),
        ((1, 2, 3), r"names every layer with full attention \(1, 2, 3\).*: name fewer"),
    ],
)
@pytest.mark.parametrize("writes", ["evicted", "all", "none"])
def test_full_layers_that_the_base_model_cannot_keep_are_refused(writes, layers, message):
    with pytest.raises(ValueError, match=message):
        layer_kinds(BASE, LizaConfig(writes=writes, full_layers=layers))


def test_a_model_of_sliding_layers_has_nothing_to_remember():
    sliding = ModelConfig.tiny(layer_kinds=("sliding",) * 3, sliding_window=4)
    assert memory_layers(sliding, LizaConfig(softmax_window=5)) == ()
    assert not runs_memory(sliding, LizaConfig(softmax_window=5))


def test_the_caller_overrides_the_operator():
    config = LizaConfig(
        writes="all", operator="delta_rule_v", num_householder=3, trick="rotary", alpha_gate="kv"
    )
    assert _resolved(config) == (3, "rotary", "v", "kv", "none")
    assert config.recurrence.num_householder == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [("delta_rule_gelu", "delta_product_c"), ("delta_product_c", "delta_rule_gelu")],
)
def test_with_operator_leaves_nothing_of_the_old_one(before, after):
    config = LizaConfig(writes="all", operator=before, mag_init=0.3, softmax_window=7)
    changed = config.with_operator(after)
    assert changed == LizaConfig(writes="all", operator=after, mag_init=0.3, softmax_window=7)
    assert _resolved(changed) == PAPER[after]
    assert config.operator == before


def test_with_operator_keeps_what_the_writes_say():
    config = LizaConfig(operator="delta_rule_gelu", softmax_window=7, memory_rank=2)
    changed = config.with_operator("gated_delta_product")
    assert changed == LizaConfig(operator="gated_delta_product", softmax_window=7, memory_rank=2)
    assert _resolved(changed) == (2, "derivative", "projected", "projected", "none")


@pytest.mark.parametrize("mode", PAPER)
def test_modes_of_the_reference_operator(mode):
    config = LizaConfig.tptt_reference(mode, mag_init=1.0)
    assert (config.operator, config.writes) == ("tptt_reference", "all")
    assert (config.mag, config.mag_init, config.linear_scale) == ("scheduled", 1.0, "unit")
    assert _resolved(config) == PAPER[mode]
    assert _resolved(LizaConfig.tptt_reference(mode, num_householder=3)) == (3, *PAPER[mode][1:])


def test_an_unknown_mode_of_the_reference_operator():
    with pytest.raises(ValueError, match=r"mode must be one of delta_rule, .*, got 'tptt'"):
        LizaConfig.tptt_reference("tptt")


def test_a_linear_model_has_unit_scale():
    assert LizaConfig(writes="all", softmax=False).linear_scale == "unit"
    assert LizaConfig(writes="all", softmax=False, linear_scale="match").linear_scale == "unit"


def test_the_papers_recipe():
    config = LizaConfig.paper()
    assert (config.mag, config.mag_init, config.linear_scale) == ("scheduled", 0.01, "unit")
    assert (config.writes, config.memory_rank) == ("all", 0)
    assert _resolved(config) == PAPER["delta_product"]
    assert LizaConfig.paper(mag_init=0.2, operator="delta_rule").mag_init == 0.2
    default = LizaConfig(writes="all")
    assert (default.mag, default.mag_init, default.linear_scale) == ("learned", 0.05, "match")
    assert (default.softmax_sinks, default.operator) == (4, "delta_product")


@pytest.mark.parametrize("writes", ["evicted", "all"])
@pytest.mark.parametrize("after", OPERATORS)
@pytest.mark.parametrize("before", ["delta_product", "gated_delta_rule", "delta_rule_gelu"])
def test_another_operator_brings_its_own_settings(before, after, writes):
    """`dataclasses.replace` alone kept two Householder steps under the name "delta_rule"."""
    config = LizaConfig(writes=writes, operator=before, softmax_window=9)
    want = LizaConfig(writes=writes, operator=after, softmax_window=9)
    assert dataclasses.replace(config, operator=after) == want
    # Also if the settings were written out, as they are in files.
    read = LizaConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert read == config
    assert dataclasses.replace(read, operator=after) == want


def test_what_was_chosen_stays_with_another_operator():
    config = LizaConfig(operator="delta_product", num_householder=3, beta_gate="v")
    changed = dataclasses.replace(config, operator="delta_rule")
    assert (changed.num_householder, changed.beta_gate) == (3, "v")
    assert dataclasses.replace(changed, num_householder=2).num_householder == 2
    assert dataclasses.replace(LizaConfig(), writes="all") == LizaConfig(writes="all")
    assert hash(changed) == hash(dataclasses.replace(changed))


def test_an_operator_resets_what_has_the_old_default():
    config = LizaConfig(operator="delta_rule", num_householder=1, beta_gate="v", chunk_size=32)
    changed = dataclasses.replace(config, operator="delta_product")
    assert (changed.num_householder, changed.beta_gate, changed.chunk_size) == (2, "v", 32)


def test_files_and_copies_of_a_configuration():
    config = LizaConfig(full_layers=(1,))
    values = dataclasses.asdict(config)
    assert {type(x) for x in values.values()} == {str, int, float, bool, tuple, type(None)}
    assert LizaConfig(**yaml.safe_load(yaml.safe_dump(values))) == config
    other = dataclasses.replace(config, operator="delta_product")
    for copied in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert dataclasses.replace(copied, operator="delta_product") == other
