import dataclasses
from typing import Any

import gguf
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError, load_pretrained
from convert.families.rotary import llama3_divisors
from convert.formats import GgufFile
from convert.loading import variables_of
from convert.sources.opening import open_gguf
from tests.convert.checkpoints import (
    GEMMA,
    LLAMA,
    OLMO2,
    OLMOE,
    QWEN2,
    QWEN3,
    hf_shapes,
    random_tensors,
    write_directory,
)
from tests.convert.test_rules import llama_cpp_permute
from tptt_jax.config import RopeConfig

# Hugging Face name -> GGUF name, from the gguf package's own table.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
}


def write_gguf(
    path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    kind=None,
    extra: dict[str, np.ndarray] | None = None,
    numbers: dict[str, Any] | None = None,
    split: int = 0,
):
    """What llama.cpp's convert_hf_to_gguf.py writes, without a tokenizer."""
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split)
    for key, value in (numbers or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{writer.arch}.{key}", value)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(5)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for name, value in _stack_experts(tensors).items():
        if config["model_type"] == "llama" and ".q_proj." in name:
            value = llama_cpp_permute(value, config["num_attention_heads"])
        if config["model_type"] == "llama" and ".k_proj." in name:
            value = llama_cpp_permute(value, config["num_key_value_heads"])
        if config["model_type"] == "gemma3_text" and "norm" in name:
            value = value + 1
        stored = names.get_name(name, (".weight", ".bias"))
        if kind is not None and value.ndim == 2:
            value = gguf.quantize(value, kind)
            writer.add_tensor(stored, value, raw_dtype=kind)
        else:
            writer.add_tensor(stored, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stack_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """llama.cpp holds the experts of a layer in one tensor."""
    result, experts = {}, {}
    for name, value in tensors.items():
        base, found, rest = name.partition("mlp.experts.")
        if found:
            number, _, part = rest.partition(".")
            experts.setdefault(f"{base}mlp.experts.{part}", {})[int(number)] = value
        else:
            result[name] = value
    for name, parts in experts.items():
        result[name] = np.stack([parts[number] for number in sorted(parts)])
    return result


def values_of(model: nnx.Module) -> dict[str, np.ndarray]:
    return {name: np.asarray(v.get_value()) for name, (_, v) in variables_of(model).items()}


BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_size": 32}


CONFIGS = {
    **{"llama": LLAMA, "biases": BIASED, "gemma": GEMMA},
    **{"qwen2": QWEN2, "qwen3": QWEN3, "olmo2": OLMO2, "olmoe": OLMOE},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gguf_and_safetensors_give_the_same_model(tmp_path, config):
    tensors = random_tensors(hf_shapes(config))
    wanted = load_pretrained(write_directory(tmp_path / "hf", config, tensors))
    model = load_pretrained(write_gguf(tmp_path / "model.gguf", config, tensors))
    for name, value in values_of(wanted).items():
        # 1 + w - 1 costs a rounding.
        atol = 1e-6 if "norm" in name else 0
        np.testing.assert_allclose(values_of(model)[name], value, rtol=0, atol=atol, err_msg=name)
    for field in ("layer_kinds", "rope", "sliding_rope", "norm", "attention_scale"):
        if (config["model_type"], field) != ("gemma3_text", "attention_scale"):
            assert getattr(model.config, field) == getattr(wanted.config, field)
    assert model.config.attention_scale == config["head_dim"] ** -0.5
    if config["model_type"] not in ("llama", "gemma3_text"):
        positions = {"max_positions": wanted.config.max_positions}
        ids = {"bos_token_id": 1, "eos_token_ids": (2, 3)}
        assert dataclasses.replace(model.config, **ids, **positions) == wanted.config
    assert (model.config.bos_token_id, model.config.eos_token_ids) == (2, (1, 5))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_quantised_tensors_are_those_of_the_gguf_package(tmp_path, kind):
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    kind = gguf.GGMLQuantizationType[kind]
    tensors = random_tensors(hf_shapes(config))
    path = write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind)
    up = gguf.dequantize(gguf.quantize(tensors["model.layers.2.mlp.up_proj.weight"], kind), kind)
    file = GgufFile(path)
    assert file.tensors["blk.2.ffn_up.weight"].dtype == kind.name
    np.testing.assert_array_equal(file.read("blk.2.ffn_up.weight"), up)
    model = load_pretrained(path)
    np.testing.assert_array_equal(values_of(model)["stacks.0.mlp.up_proj.kernel"][2], up.T)


def test_blocks_of_rows_do_not_show(tmp_path, monkeypatch):
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    tensors = random_tensors(hf_shapes(config))
    path = write_gguf(tmp_path / "a.gguf", config, tensors, kind=gguf.GGMLQuantizationType.Q8_0)
    whole = GgufFile(path).read("token_embd.weight")
    monkeypatch.setattr("convert.formats.gguf_io._ELEMENTS_AT_ONCE", 64 * 7)
    np.testing.assert_array_equal(GgufFile(path).read("token_embd.weight"), whole)


@pytest.mark.parametrize(("factor", "original"), [(32.0, 8192), (8.0, 8192), (4.0, 1024)])
def test_llama3_scaling_is_recognised(tmp_path, factor, original):
    rope = RopeConfig(theta=5e5, scaling="llama3", factor=factor, original_max_positions=original)
    config = LLAMA | {"head_dim": 64}
    divisors = llama3_divisors(rope, 64).astype(np.float32)
    path = write_gguf(
        tmp_path / "a.gguf",
        config,
        random_tensors(hf_shapes(config)),
        extra={"rope_freqs.weight": divisors},
    )
    assert open_gguf(path).config.rope == rope
    load_pretrained(path)


def test_llama3_divisors_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings_ = {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    theirs = LlamaConfig(head_dim=64, rope_parameters=settings_)
    frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    rope = RopeConfig(theta=5e5, scaling="llama3", factor=32.0)
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(
        plain / llama3_divisors(rope, 64), frequency.double().numpy(), rtol=1e-5
    )


def test_other_rotary_factors_are_refused(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        LLAMA,
        random_tensors(hf_shapes(LLAMA)),
        extra={"rope_freqs.weight": np.linspace(1, 9, 5, dtype=np.float32)},
    )
    with pytest.raises(ConversionError, match="not Llama 3's"):
        open_gguf(path)


# What llama.cpp's converter writes for these settings of transformers, and older files have.
ROPES = {
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"scaling": "linear", "factor": 4.0},
    ),
    "linear without a type": (
        {"rope.scaling.factor": 4.0},
        {"scaling": "linear", "factor": 4.0},
    ),
    "linear of old files": ({"rope.scale_linear": 4.0}, {"scaling": "linear", "factor": 4.0}),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "yarn": (
        {
            **{"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0},
            "rope.scaling.original_context_length": 64,
        },
        {"scaling": "yarn", "factor": 8.0, "original_max_positions": 64},
    ),
    "yarn, all": (
        {
            **{"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0},
            **{"rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 16.0},
            **{"rope.scaling.yarn_beta_slow": 0.1, "rope.scaling.yarn_attn_factor": 0.7},
            "rope.scaling.yarn_ext_factor": 1.0,
        },
        {
            **{"scaling": "yarn", "factor": 8.0, "original_max_positions": 64},
            **{"beta_fast": 16.0, "beta_slow": 0.1, "attention_factor": 0.7},
        },
    ),
}


@pytest.mark.parametrize(("numbers", "want"), ROPES.values(), ids=ROPES)
def test_scaled_rotary_embeddings(tmp_path, numbers, want):
    path = write_gguf(tmp_path / "a.gguf", QWEN2, random_tensors(hf_shapes(QWEN2)), numbers=numbers)
    assert open_gguf(path).config.rope == RopeConfig(theta=QWEN2["rope_theta"], **want)


LONGROPE = {
    **{"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.25},
    "rope.scaling.original_context_length": 16,
}


def test_longrope_has_its_factors_in_tensors(tmp_path):
    short, long = np.linspace(1, 2, 5, dtype="f4"), np.linspace(1, 9, 5, dtype="f4")
    path = write_gguf(
        tmp_path / "a.gguf",
        LLAMA | {"head_dim": 10},
        random_tensors(hf_shapes(LLAMA | {"head_dim": 10})),
        numbers=LONGROPE,
        extra={"rope_factors_short.weight": short, "rope_factors_long.weight": long},
    )
    rope = load_pretrained(path).config.rope
    assert (rope.scaling, rope.original_max_positions) == ("longrope", 16)
    assert rope.attention_scale == 1.25
    np.testing.assert_array_equal(np.float32(rope.short_factor), short)
    np.testing.assert_array_equal(np.float32(rope.long_factor), long)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (LONGROPE, "rope scaling 'longrope'"),
        ({"rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor = 0.5",
        ),
    ],
    ids=["no factors", "unknown", "half of yarn"],
)
def test_other_scalings_are_refused(tmp_path, numbers, message):
    path = write_gguf(tmp_path / "a.gguf", LLAMA, random_tensors(hf_shapes(LLAMA)), numbers=numbers)
    with pytest.raises(ConversionError, match=message):
        open_gguf(path)


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    tensors = random_tensors(hf_shapes(LLAMA))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    extra = {"blk.0.strange": np.zeros(3, np.float32)}
    path = write_gguf(tmp_path / "a.gguf", LLAMA, tensors, extra=extra)
    with pytest.raises(
        ConversionError, match=r"missing: blk\.1\.ffn_up\.weight; unexpected: blk\.0\.strange"
    ):
        load_pretrained(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("nested", [[1], [2, 3]])
    writer.add_float32("pi", 3.25)
    writer.add_bool("yes", True)
    writer.add_tensor("w", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("v", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_shapes(small_file):
    file = GgufFile(small_file)
    assert file.metadata == {
        "general.architecture": "llama",
        "words": ["a", "bc", ""],
        "numbers": [1, 2, 3],
        "nested": [[1], [2, 3]],
        "pi": 3.25,
        "yes": True,
    }
    assert file.tensors["w"].shape == (3, 4)
    np.testing.assert_array_equal(file.read("w"), np.arange(12).reshape(3, 4))


def test_every_truncation_is_refused(small_file, tmp_path):
    content = small_file.read_bytes()
    last = GgufFile(small_file).tensors["v"].nbytes
    # The file is padded behind its last tensor; before that, every byte counts.
    padding = 32 - last
    for length in [*range(0, len(content) - padding, 11), len(content) - padding - 1]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:length])
        with pytest.raises(ConversionError, match="not a readable GGUF file"):
            GgufFile(path)


@settings(max_examples=200)
@given(data=st.data())
def test_no_header_makes_it_crash(small_file, tmp_path_factory, data):
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        for name in file.tensors:
            file.read(name)
    except ConversionError:
        pass


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [(0, b"GGML", "does not begin with GGUF"), (4, b"\x09\0\0\0", "version 9")],
)
def test_other_files_are_refused(small_file, tmp_path, position, value, message):
    content = small_file.read_bytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(content[:position] + value + content[position + len(value) :])
    with pytest.raises(ConversionError, match=message):
        GgufFile(path)


def test_a_model_needs_its_metadata(small_file):
    with pytest.raises(ConversionError, match=r"lacks the tensor token_embd\.weight"):
        open_gguf(small_file)


def test_demo_header_is_what_the_gguf_package_reads(demo_model_path):
    file = GgufFile(demo_model_path)
    assert len(file.tensors) == 236
    assert file.metadata["gemma3.context_length"] == 32768
    assert file.metadata["tokenizer.ggml.tokens"][:3] == ["<pad>", "<eos>", "<bos>"]
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 262144
    assert file.tensors["blk.0.ffn_down.weight"].dtype == "Q6_K"


def test_config_of_the_demo(demo_model_path):
    from tptt_jax import ModelConfig

    assert open_gguf(demo_model_path).config == ModelConfig.gemma3_270m()


def test_no_such_file(tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        GgufFile(tmp_path / "none.gguf")
