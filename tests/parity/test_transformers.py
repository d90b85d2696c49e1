"""Our models against transformers, in float32 on the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained
from convert.loading import variables_of
from tests.contracts import logits_of
from tptt_jax import LizaConfig, LoraConfig

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")

from tests.parity.torch_models import build, relative_error, reload, torch_logits  # noqa: E402

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Random logits of the size that trained ones have.
    "initializer_range": 0.3,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
# With the default period of 6, layers 0-4 and 6 see eight tokens and layer 5 sees all.
GEMMA = {
    **SIZES,
    **{"num_hidden_layers": 7, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 24},
}


def llama(**changes):
    return transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 3, "head_dim": 10} | changes)


CONFIGS = {
    "llama": llama(),
    "llama, tied": llama(tie_word_embeddings=True),
    "llama, head_dim of hidden / heads": llama(head_dim=None),
    "llama, biases": llama(attention_bias=True, mlp_bias=True),
    "llama, one head": llama(num_attention_heads=1, num_key_value_heads=1),
    "llama3": llama(rope_parameters=LLAMA3),
    "llama, linear": llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "gemma": transformers.Gemma3TextConfig(**GEMMA),
    "gemma, untied": transformers.Gemma3TextConfig(**GEMMA, tie_word_embeddings=False),
    "gemma, cap": transformers.Gemma3TextConfig(**GEMMA, final_logit_softcapping=4.0),
    "gemma, linear": transformers.Gemma3TextConfig(
        **GEMMA,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}
TOKENS = np.random.default_rng(0).integers(3, 101, (2, 77))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_of_a_tiny_model(tmp_path, config):
    model = build(config)
    model.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert relative_error(logits_of(ours, TOKENS), torch_logits(model, TOKENS)) <= 1e-5


SAVES = {
    "sharded": {"max_shard_size": "20KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, sharded": {"dtype": torch.float16, "max_shard_size": "20KB"},
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
@pytest.mark.parametrize("name", ["llama, biases", "gemma"])
def test_shards_and_halves(tmp_path, name, save):
    model = build(CONFIGS[name])
    size = save.get("max_shard_size", "5GB")
    model.to(save.get("dtype", torch.float32)).save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or size == "20KB"
    # Read again: a model that is cast in place keeps rotary frequencies of 16 bits.
    wanted = torch_logits(reload(tmp_path), TOKENS)
    assert relative_error(logits_of(load_pretrained(tmp_path), TOKENS), wanted) <= 1e-5


def test_bare_decoder(tmp_path):
    model = build(CONFIGS["llama, tied"])
    model.model.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert relative_error(logits_of(ours, TOKENS), torch_logits(model, TOKENS)) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_export_loads_in_transformers(tmp_path, config):
    model = build(config)
    model.save_pretrained(tmp_path / "a")
    ours = load_pretrained(tmp_path / "a", LizaConfig(writes="all"), LoraConfig(rank=2))
    export_pretrained(ours, tmp_path / "b", source=tmp_path / "a")
    exported = reload(tmp_path / "b")
    np.testing.assert_array_equal(torch_logits(exported, TOKENS), torch_logits(model, TOKENS))
    wanted, found = (reload(tmp_path / name).config.to_dict() for name in ("a", "b"))
    # For transformers 4 and others; today's own configurations do not have it.
    found.pop("sliding_window_pattern", None)
    assert found | {"_name_or_path": wanted["_name_or_path"]} == wanted


def test_export_without_its_source(tmp_path):
    model = build(CONFIGS["gemma, linear"])
    model.save_pretrained(tmp_path / "a")
    export_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b")
    exported = reload(tmp_path / "b")
    np.testing.assert_array_equal(torch_logits(exported, TOKENS), torch_logits(model, TOKENS))


def test_sharded_bfloat16_export(tmp_path, monkeypatch):
    model = build(CONFIGS["llama3"]).bfloat16()
    model.save_pretrained(tmp_path / "a")
    ours = load_pretrained(tmp_path / "a", dtype=jnp.bfloat16)
    monkeypatch.setattr("convert.formats.hf_directory.write_weights.__defaults__", (20_000,))
    export_pretrained(ours, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    exported = reload(tmp_path / "b", dtype="auto")
    assert exported.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter), name


@pytest.mark.parametrize("name", ["llama, biases", "gemma"])
def test_merged_adapters(tmp_path, name):
    build(CONFIGS[name]).save_pretrained(tmp_path / "a")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ours = load_pretrained(tmp_path / "a", lora=LoraConfig(rank=3, alpha=5.0, targets=targets))
    rng = np.random.default_rng(3)
    variables = variables_of(ours).values()
    for _, variable in variables:
        if isinstance(variable, nnx.LoRAParam):
            shape = variable.get_value().shape
            variable.set_value(jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32))
    nnx.update(ours, nnx.from_flat_state(list(variables)))
    wanted = logits_of(ours, TOKENS)
    export_pretrained(ours, tmp_path / "b", source=tmp_path / "a")
    exported = torch_logits(reload(tmp_path / "b"), TOKENS)
    assert relative_error(exported, wanted) <= 1e-5
    plain = logits_of(load_pretrained(tmp_path / "a"), TOKENS)
    assert relative_error(plain, wanted) > 0.1
