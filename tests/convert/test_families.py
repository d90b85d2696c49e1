import copy
import dataclasses
import json

import pytest
import transformers

from convert import ConversionError
from convert.families import family_of, family_of_architecture
from convert.families.rotary import write_rope
from convert.sources.opening import read_config
from tests.convert.checkpoints import GEMMA, LLAMA, OLMO2, OLMOE, QWEN2, QWEN3
from tptt_jax import ModelConfig
from tptt_jax.config import AttentionConfig, MlpConfig, NormConfig, RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_ROPE = RopeConfig(theta=5e5, scaling="llama3", factor=32.0)
LINEAR = {"rope_type": "linear", "factor": 8.0}


def read(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    return read_config(tmp_path)[1]


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


def test_llama(tmp_path):
    assert read(tmp_path, LLAMA) == ModelConfig(
        family="llama",
        vocab_size=97,
        embed_dim=36,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=44,
        norm=NormConfig(eps=1e-5),
        tie_embeddings=False,
        rope=RopeConfig(theta=5e5),
        max_positions=512,
        bos_token_id=1,
        eos_token_ids=(2, 3),
    )


def test_gemma(tmp_path):
    assert read(tmp_path, GEMMA) == ModelConfig(
        family="gemma3_text",
        vocab_size=97,
        embed_dim=24,
        num_layers=7,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=40,
        mlp=MlpConfig(activation="gelu_tanh"),
        norm=NormConfig(offset=True, placement="both"),
        attention=AttentionConfig(qk_norm="head", query_scale=0.25),
        scale_embeddings=True,
        layer_kinds=("sliding",) * 5 + ("full", "sliding"),
        sliding_window=5,
        rope=RopeConfig(theta=1e6),
        sliding_rope=RopeConfig(theta=1e4),
        max_positions=512,
        bos_token_id=2,
        eos_token_ids=(1,),
        pad_token_id=0,
    )


PUBLISHED_AND_NEW = {
    "llama plain": (LLAMA, without(LLAMA, "rope_theta"), {"rope_theta": 5e5}),
    "llama3": (
        LLAMA | {"rope_scaling": LLAMA3},
        without(LLAMA, "rope_theta"),
        LLAMA3 | {"rope_theta": 5e5},
    ),
    "llama linear, old name": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 8.0}},
        without(LLAMA, "rope_theta"),
        LINEAR | {"rope_theta": 5e5},
    ),
    "gemma": (
        GEMMA | {"rope_scaling": LINEAR},
        without(GEMMA, "rope_theta", "rope_local_base_freq", "sliding_window_pattern")
        | {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]},
        {
            "full_attention": LINEAR | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


@pytest.mark.parametrize(
    ("published", "new", "rope"), PUBLISHED_AND_NEW.values(), ids=PUBLISHED_AND_NEW.keys()
)
def test_published_and_new_form_agree(tmp_path, published, new, rope):
    new = without(new, "torch_dtype") | {"dtype": "float32", "rope_parameters": rope}
    assert read(tmp_path, published) == read(tmp_path, new)


def test_rope_values(tmp_path):
    assert read(tmp_path, LLAMA | {"rope_scaling": LLAMA3}).rope == LLAMA3_ROPE
    gemma = read(tmp_path, GEMMA | {"rope_scaling": LINEAR})
    assert gemma.rope == RopeConfig(theta=1e6, scaling="linear", factor=8.0)
    assert gemma.sliding_rope == RopeConfig(theta=1e4)


def test_defaults_are_those_of_transformers(tmp_path):
    bare = without(
        LLAMA,
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "hidden_act",
        "torch_dtype",
    ) | {"hidden_size": 40}
    ours, theirs = read(tmp_path, bare), transformers.LlamaConfig(**bare)
    assert ours.num_kv_heads == theirs.num_key_value_heads == 4
    assert ours.head_dim == theirs.head_dim == 10
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm.eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    bare = without(
        GEMMA,
        "head_dim",
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "sliding_window",
        "sliding_window_pattern",
        "query_pre_attn_scalar",
        "rms_norm_eps",
        "attention_bias",
    )
    ours, theirs = read(tmp_path, bare), transformers.Gemma3TextConfig(**bare)
    assert ours.head_dim == theirs.head_dim
    assert ours.rope.theta == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert ours.sliding_rope.theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    assert ours.sliding_window == theirs.sliding_window
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert [f"{kind}_attention" for kind in ours.layer_kinds] == theirs.layer_types


CONFIGS = {
    "tiny": ModelConfig.tiny(),
    "smollm2": ModelConfig.smollm2_135m(),
    "gemma3": ModelConfig.gemma3_270m(),
    "llama3.2": ModelConfig.llama3_2_1b(),
    "llama3, biases": ModelConfig.tiny(
        rope=LLAMA3_ROPE,
        attention=AttentionConfig(bias=True, out_bias=True),
        mlp=MlpConfig(bias=True),
    ),
    "gemma 27b": dataclasses.replace(
        ModelConfig.gemma3_270m(),
        attention=AttentionConfig(qk_norm="head", query_scale=168**-0.5),
        rope=RopeConfig(theta=1e6, scaling="linear", factor=8.0),
        final_softcap=30.0,
        eos_token_ids=(1, 106),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_written_config_is_read_back_here_and_by_transformers(tmp_path, config):
    content = family_of(config.family).config_json(config)
    assert read(tmp_path, content) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: theirs.get(key, "absent") for key in content} == content


OLD_KEYS = {
    "llama": (LLAMA, {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": (
        LLAMA | {"rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "linear": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_scaling": LINEAR},
    ),
    "qwen2, windows": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"rope_theta": 5e5, "rope_scaling": None, "max_window_layers": 1},
    ),
    "qwen3": (QWEN3, {"rope_theta": 5e5, "rope_scaling": None}),
    "mistral": (LLAMA | {"model_type": "mistral"}, {"rope_theta": 5e5, "rope_scaling": None}),
    "olmo": (LLAMA | {"model_type": "olmo"}, {"rope_theta": 5e5, "rope_scaling": None}),
    "olmo2": (OLMO2, {"rope_theta": 5e5, "rope_scaling": None}),
    "olmoe": (OLMOE, {"rope_theta": 5e5, "rope_scaling": None}),
    "gemma": (
        GEMMA | {"rope_scaling": LINEAR, "rope_local_base_freq": 500.0},
        {
            **{"rope_theta": 1e6, "rope_scaling": LINEAR, "rope_local_base_freq": 500.0},
            "sliding_window_pattern": 6,
        },
    ),
    "gpt2": ({"model_type": "gpt2", "n_positions": 128}, {"n_ctx": 128}),
}


@pytest.mark.parametrize(("published", "old"), OLD_KEYS.values(), ids=OLD_KEYS.keys())
def test_old_keys_alone_say_what_the_new_ones_do(tmp_path, published, old):
    config = read(tmp_path, published)
    family = family_of(config.family)
    new = family.config_json(config)
    assert family.write_old_config(config) == old
    assert read(tmp_path, new | old) == config
    assert read(tmp_path, without(new | old, "rope_parameters", "layer_types")) == config
    # transformers writes into the objects that it is given.
    theirs = [
        transformers.AutoConfig.for_model(**copy.deepcopy(content)).to_dict()
        for content in (new, new | old)
    ]
    assert theirs[0].get("rope_parameters") == theirs[1].get("rope_parameters")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"attention": AttentionConfig(qk_norm="head")}, r"attention\.qk_norm"),
        ({"attention": AttentionConfig(bias=True)}, r"attention\.out_bias"),
        (
            {"mlp": MlpConfig(activation="gelu_tanh"), "final_softcap": 3.0},
            r"final_softcap, mlp\.activation",
        ),
    ],
)
def test_a_config_outside_its_family_is_refused(changes, field):
    with pytest.raises(ConversionError, match=f"cannot express this model's {field}"):
        family_of("llama").config_json(ModelConfig.tiny(**changes))


WRONG = {
    "unknown family": (LLAMA | {"model_type": "mamba"}, "'mamba' is not supported; supported:"),
    "no family": (without(LLAMA, "model_type"), "lacks model_type"),
    "family is a number": (LLAMA | {"model_type": 3}, "must be a string"),
    "multimodal": ({"model_type": "gemma3", "text_config": GEMMA}, "multimodal wrapper"),
    "quantised": (LLAMA | {"quantization_config": {}}, "quantised"),
    "no size": (without(LLAMA, "hidden_size"), "lacks hidden_size"),
    "size is a string": (LLAMA | {"hidden_size": "36"}, "must be an integer"),
    "size is true": (LLAMA | {"num_hidden_layers": True}, "must be an integer"),
    "no heads": (LLAMA | {"num_attention_heads": 0}, "num_heads must be at least 1"),
    "heads do not divide": (LLAMA | {"num_key_value_heads": 3}, "must be a multiple"),
    "rope is a list": (LLAMA | {"rope_scaling": []}, "must be an object"),
    "unknown rope": (LLAMA | {"rope_scaling": {"rope_type": "ntk"}}, "'ntk'.*supported:"),
    "unknown new rope": (LLAMA | {"rope_parameters": {"rope_type": "su"}}, "'su'"),
    "rope by layer": (
        LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "differs by layer",
    ),
    "no factor": (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
    "partial rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "negative theta": (LLAMA | {"rope_theta": -1.0}, "must be positive"),
    "activation": (LLAMA | {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    "gemma rope": (GEMMA | {"rope_scaling": {"rope_type": "ntk"}}, "'ntk'"),
    "gemma truncation": (
        GEMMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate = False",
    ),
    "yarn without factor": (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "lacks factor"),
    "gemma layer type": (GEMMA | {"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
    "gemma layer count": (GEMMA | {"layer_types": ["full_attention"]}, "1 entries"),
    "bidirectional": (GEMMA | {"use_bidirectional_attention": True}, "not supported"),
    "attention cap": (GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "eos": (GEMMA | {"eos_token_id": ["1"]}, "must hold integers"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_supported_is_said(tmp_path, content, message):
    with pytest.raises(ConversionError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize("text", ["{", "3", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_bad_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(ConversionError, match=r"no such file: .*config\.json"):
        read_config(tmp_path)


def test_unknown_gguf_architecture():
    with pytest.raises(ConversionError, match="'rwkv7' is not supported; supported: gemma3, llama"):
        family_of_architecture("rwkv7")


def test_dynamic_scaling_of_another_length_is_not_written():
    """A file says nothing of where it begins: whoever reads it takes the model's positions."""
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_max_positions=16)
    assert write_rope(rope, 16)["rope_type"] == "dynamic"
    with pytest.raises(ConversionError, match=r"must begin at the model's 64 .* begins at 16: set"):
        write_rope(rope, 64)
