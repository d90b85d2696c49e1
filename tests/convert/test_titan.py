"""The "titan" export as files: no torch needed."""

import ast
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import convert
from convert import ConversionError, export_pretrained, load_pretrained, load_tokenizer
from convert.__main__ import main
from convert.formats import SafetensorsDirectory
from tests.contracts import logits_of, random_tokens, randomize
from tests.convert.checkpoints import GEMMA, LLAMA, write_directory
from tests.convert.test_pretrained import LORA, fill_adapters, values_of
from tests.tiny import make_tokenizer
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.config import (
    AttentionConfig,
    ExpertsConfig,
    LayerSizes,
    MlpConfig,
    NormConfig,
    RopeConfig,
    flat_fields,
)

MODELING = Path(convert.__file__).with_name("titan") / "modeling_titan.py"
GEMMA_PARTS = {
    "norm": NormConfig(offset=True, placement="both"),
    "attention": AttentionConfig(qk_norm="head"),
}
CASES = {
    "defaults": ({}, LizaConfig()),
    "every token": ({}, LizaConfig(writes="all")),
    "only a window": ({}, LizaConfig(writes="none", softmax_window=8)),
    "window": ({}, LizaConfig(softmax_window=6, softmax_sinks=2)),
    "order 2": ({}, LizaConfig.named("gated_delta_product", mag="learned", softmax_window=6)),
    "gates of the paper": (
        {},
        LizaConfig(
            **{"beta_gate": "k", "alpha_gate": "projected", "memory_rank": 0},
            **{"linear_scale": "match", "mag": "scheduled", "softmax_window": 6},
        ),
    ),
    "base model": ({"tie_embeddings": False}, None),
    "scheduled": ({}, LizaConfig(writes="all", mag="scheduled", mag_init=0.25)),
    "deltas": (
        {"mlp": MlpConfig(bias=True)},
        LizaConfig(writes="all", memory_rank=2, operator="gated_delta_product"),
    ),
    "linear": (
        {"attention": AttentionConfig(bias=True)},
        LizaConfig(writes="all", softmax=False, precision="high"),
    ),
    "ropes": (
        {
            **GEMMA_PARTS,
            "layer_kinds": ("sliding", "full", "full"),
            "sliding_window": 9,
            "sliding_rope": RopeConfig(theta=77.0),
            "rope": RopeConfig(scaling="llama3", factor=8.0),
            "eos_token_ids": (5, 6),
            "pad_token_id": 0,
        },
        LizaConfig(writes="all", softmax_window=5, softmax_sinks=1),
    ),
    "sliding layers": (
        {
            **GEMMA_PARTS,
            **{"layer_kinds": ("sliding", "full", "sliding", "full"), "num_layers": 4},
            **{"sliding_window": 9, "sliding_rope": RopeConfig(theta=77.0)},
        },
        LizaConfig(softmax_window=5, softmax_sinks=1),
    ),
    "kept layers": (
        {},
        LizaConfig(softmax_window=6, softmax_sinks=1, full_layers=(2,)),
    ),
    "gpt2": (
        {
            "norm": NormConfig(kind="layer", bias=True),
            "position_embedding": "learned",
            "mlp": MlpConfig(gated=False),
            "attention": AttentionConfig(fused_qkv=True, bias=True, out_bias=True, clip_qkv=3.0),
        },
        LizaConfig(softmax_window=6),
    ),
    "layers of many sizes": (
        {
            "per_layer": LayerSizes(num_heads=(2, 2, 4), mlp_dim=(8, 48, 48)),
            "attention": AttentionConfig(qk_norm="full"),
        },
        LizaConfig(memory_rank=1, softmax_window=6),
    ),
    "experts": (
        {"experts": ExpertsConfig(number=3, per_token=2), "norm": NormConfig(weight=False)},
        LizaConfig(writes="all"),
    ),
}


def build(name: str, dtype=jnp.float32) -> CausalLM:
    changes, liza = CASES[name]
    return randomize(CausalLM(ModelConfig.tiny(**changes), liza, dtype=dtype, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(tmp_path, name, dtype):
    model = build(name, jnp.dtype(dtype))
    if model.mag_share is not None:
        model.mag_share.set_value(jnp.float32(0.123))
    export_pretrained(model, tmp_path / "t", "titan")
    again = load_pretrained(tmp_path / "t", dtype=jnp.dtype(dtype))
    assert (again.config, again.liza, again.lora) == (model.config, model.liza, None)
    old, new = values_of(model), values_of(again)
    assert old.keys() == new.keys()
    for path, value in old.items():
        assert value.dtype == new[path].dtype, path
        np.testing.assert_array_equal(value, new[path], err_msg=path)


LAYOUT: dict[str, dict[str, tuple[str, str, tuple[int, ...]]]] = {
    "deltas": {
        "self_attn.k_proj": ("weight", "kernel", (32, 32)),
        "self_attn.memory.k_delta": ("a", "a", (32, 2)),
        "self_attn.mag": ("logit", "logit", (4,)),
        "mlp.up_proj": ("weight", "kernel", (48, 32)),
        "attn_norm": ("weight", "weight", (32,)),
    },
    "window": {
        "self_attn.memory.k_delta": ("a", "a", (64, 16)),
        "self_attn.memory.gates.beta": ("weight", "kernel", (2, 64)),
        "self_attn.memory.gates.keep": ("bias", "bias", (2,)),
        "self_attn.memory.scale": ("weight", "weight", (4, 16)),
        "self_attn.mag": ("slope", "slope", (4,)),
    },
}


@pytest.mark.parametrize("name", LAYOUT)
def test_names_and_layout_of_torch(tmp_path, name):
    """What PEFT looks for: linear layers [out, in] under the usual names."""
    model = build(name)
    export_pretrained(model, tmp_path / "t", "titan")
    stored, values = SafetensorsDirectory(tmp_path / "t"), values_of(model)
    for module, (theirs, ours, shape) in LAYOUT[name].items():
        tensor = stored.read(f"layers.1.{module}.{theirs}")
        assert tensor.shape == shape
        value = values[f"stacks.0.{module}.{ours}"][1]
        np.testing.assert_array_equal(tensor, value.T if ours == "kernel" else value)
    assert "lm_head.weight" not in stored.tensors


def test_sliding_layers_have_no_memory(tmp_path):
    """In the file as in the model, whose stack of memories counts the other layers only."""
    model = build("sliding layers")
    export_pretrained(model, tmp_path / "t", "titan")
    stored, values = SafetensorsDirectory(tmp_path / "t"), values_of(model)
    biases = {name for name in stored.tensors if name.endswith("mag.bias")}
    assert biases == {"layers.1.self_attn.mag.bias", "layers.3.self_attn.mag.bias"}
    last = stored.read("layers.3.self_attn.mag.bias")
    np.testing.assert_array_equal(last, values["stacks.0.self_attn.mag.bias"][1])


def test_adapters_are_merged(tmp_path):
    source = write_directory(tmp_path / "llama", LLAMA)
    model = load_pretrained(source, LizaConfig(), LORA)
    fill_adapters(model)
    export_pretrained(model, tmp_path / "t", "titan", source=source)
    tokens = random_tokens((2, 9))
    again = load_pretrained(tmp_path / "t")
    assert again.lora is None
    wanted = logits_of(model, tokens)
    np.testing.assert_allclose(logits_of(again, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_the_directory_brings_its_memory_unless_one_is_given(tmp_path):
    model = build("every token")
    export_pretrained(model, tmp_path / "t", "titan")
    other = LizaConfig(writes="all", softmax_window=7)
    again = load_pretrained(tmp_path / "t", other)
    assert again.liza == other
    values = values_of(again)
    for path, value in values_of(model).items():
        np.testing.assert_array_equal(values[path], value)
    with pytest.raises(ConversionError, match=r"missing: layers\.0\.self_attn\.memory\.k_delta\.a"):
        load_pretrained(tmp_path / "t", LizaConfig(writes="all", memory_rank=3))
    with pytest.raises(ConversionError, match=r"missing: layers\.0\.self_attn\.mag\.bias"):
        load_pretrained(tmp_path / "t", LizaConfig(memory_rank=0))


def test_a_directory_from_before_there_was_a_choice(tmp_path):
    """Of what is written, and of the precision."""
    model = build("linear")
    export_pretrained(model, tmp_path / "t", "titan")
    path = tmp_path / "t" / "config.json"
    config = json.loads(path.read_text())
    assert config["liza"].pop("precision") == "high"
    assert config["liza"].pop("writes") == "all"
    path.write_text(json.dumps(config))
    again = load_pretrained(tmp_path / "t")
    assert again.liza == LizaConfig(writes="all", softmax=False)
    values = values_of(again)
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(values[name], value)


def test_a_plain_model_gets_a_memory_when_it_is_read(tmp_path):
    model = build("base model")
    export_pretrained(model, tmp_path / "t", "titan")
    again = load_pretrained(tmp_path / "t", LizaConfig(memory_rank=1))
    assert again.liza == LizaConfig(memory_rank=1)
    values = values_of(again)
    for path, value in values_of(model).items():
        np.testing.assert_array_equal(values[path], value)


@pytest.mark.parametrize("name", ["scheduled", "kept layers", "base model"])
def test_verify_takes_the_memory_of_the_export(tmp_path, monkeypatch, capsys, name):
    export_pretrained(build(name), tmp_path / "t", "titan")
    arguments = ["convert", "verify", str(tmp_path / "t"), "--tokens", "12", "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_titan_becomes_a_plain_model_again(tmp_path):
    source = write_directory(tmp_path / "gemma", GEMMA)
    model = load_pretrained(source, LizaConfig())
    export_pretrained(model, tmp_path / "t", "titan", source=source)
    export_pretrained(
        load_pretrained(tmp_path / "t"), tmp_path / "m", "merged", source=tmp_path / "t"
    )
    a, b = SafetensorsDirectory(source), SafetensorsDirectory(tmp_path / "m")
    assert a.tensors == b.tensors
    for name in a.tensors:
        np.testing.assert_array_equal(a.read(name), b.read(name))
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert not {"auto_map", "liza"} & config.keys()


def test_what_goes_along(tmp_path):
    source = write_directory(tmp_path / "llama", LLAMA)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 9]}')
    make_tokenizer(begin=True, template="{{ messages }}").save_pretrained(source)
    model = load_pretrained(source, LizaConfig(), dtype=ml_dtypes.bfloat16)
    export_pretrained(model, tmp_path / "t", "titan", source=source)
    path = tmp_path / "t"
    assert json.loads((path / "generation_config.json").read_text())["temperature"] == 0.6
    assert load_tokenizer(path).chat_template == "{{ messages }}"
    assert (path / "modeling_titan.py").read_bytes() == MODELING.read_bytes()
    config = json.loads((path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_titan.TitanConfig",
        "AutoModelForCausalLM": "modeling_titan.TitanForCausalLM",
    }
    wanted = {
        **{"model_type": "tptt_titan", "architectures": ["TitanForCausalLM"], "dtype": "bfloat16"},
        **{"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 10},
        **{"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 97},
        **{"bos_token_id": 1, "eos_token_id": [2, 3, 9], "tie_word_embeddings": False},
    }
    assert wanted.items() <= config.items()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [(LLAMA, "PreTrainedTokenizerFast"), (GEMMA, "GemmaTokenizer")],
    ids=["llama", "gemma"],
)
def test_a_tokenizer_whose_class_is_the_models_business(tmp_path, config, wanted):
    source = write_directory(tmp_path / "source", config)
    make_tokenizer(begin=True).save_pretrained(source)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    model = load_pretrained(source)
    export_pretrained(model, tmp_path / "t", "titan", source=source)
    assert json.loads((tmp_path / "t/config.json").read_text())["tokenizer_class"] == wanted


def test_the_reference_operator_is_refused(tmp_path):
    model = CausalLM(ModelConfig.tiny(), LizaConfig.tptt_reference(), rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match='use format "tptt"'):
        export_pretrained(model, tmp_path / "t", "titan")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"liza": {"chunks": 3}}, "does not know: chunks"),
        ({"liza": {"full_layers": [3]}}, "impossible model: full_layers names layer 3, but the"),
        ({"liza": {"full_layers": [0.5]}}, "full_layers in .* cannot be"),
        ({"liza": {"operator": "magic"}}, "impossible model: operator must be one of"),
        ({"rope": {"theta": -1.0}}, "impossible model: rope theta"),
        ({"hidden_size": None}, "hidden_size in .* cannot be None"),
        ({"num_attention_heads": "four"}, "num_attention_heads in .* cannot be 'four'"),
        ({"norm_bias": 1}, "norm_bias in .* cannot be 1"),
        ({"norm": "batch"}, "impossible model: norm kind must be one of rms, layer"),
        ({"rope": []}, "rope in .* must be an object"),
        ({"layer_kinds": ["full"]}, "layer_kinds has 1 entries"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_configuration(tmp_path, change, match):
    export_pretrained(build("defaults"), tmp_path / "t", "titan")
    file = tmp_path / "t/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConversionError, match=match):
        load_pretrained(tmp_path / "t")


def test_a_truncated_file(tmp_path):
    export_pretrained(build("deltas"), tmp_path / "t", "titan")
    file = tmp_path / "t/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConversionError, match="damaged or truncated"):
        load_pretrained(tmp_path / "t")


def test_command(tmp_path, monkeypatch, capsys):
    base = write_directory(tmp_path / "llama", LLAMA)
    export_pretrained(load_pretrained(base, LizaConfig()), tmp_path / "t", "titan")
    arguments = ["convert", "export", str(tmp_path / "t"), "--output", str(tmp_path / "again")]
    monkeypatch.setattr("sys.argv", [*arguments, "--format", "titan", "--json"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["format"] == "titan"
    a, b = (tmp_path / name / "model.safetensors" for name in ("t", "again"))
    assert a.read_bytes() == b.read_bytes()


def torch_settings() -> dict[str, object]:
    """SETTINGS of the modeling file, read without running it."""
    for node in ast.parse(MODELING.read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SETTINGS":
            assert node.value is not None
            return ast.literal_eval(node.value)
    raise AssertionError("the modeling file has no SETTINGS")


def test_the_modeling_file_knows_every_setting(tmp_path):
    """transformers leaves out what equals the file's defaults, so they must be ours."""
    export_pretrained(build("defaults"), tmp_path / "t", "titan")
    config = json.loads((tmp_path / "t/config.json").read_text())
    others = {"architectures", "auto_map", "dtype", "model_type"}
    settings = torch_settings()
    assert config.keys() - others == settings.keys() - {"use_cache"}
    for name, field in flat_fields(ModelConfig).items():
        if field.default_factory is RopeConfig:
            assert RopeConfig() == RopeConfig(**settings[name]), name
        elif field.default is not dataclasses.MISSING and name in settings:
            default = field.default
            wanted = list(default) if isinstance(default, tuple) else default
            assert settings[name] == wanted, name
        elif name in settings:
            assert settings[name] is None, name
    # `operator` only sets others of them, and torch has switches of its own for precision.
    for field in dataclasses.fields(LizaConfig):
        if field.name != "precision":
            assert f'liza["{field.name}"]' in MODELING.read_text(), field.name
