"""Every family against transformers: logits, gradients, exports; float32 on the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert import export_pretrained, load_pretrained
from convert.families import FAMILIES
from tests.contracts import logits_of
from tests.convert.tiny_families import CONFIGS
from tptt_jax import LizaConfig, LoraConfig

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")

from tests.parity.family_checks import TOKENS, gradient_errors, plain_logits  # noqa: E402
from tests.parity.torch_models import (  # noqa: E402
    build,
    relative_error,
    reload,
    torch_logits,
)

pytestmark = pytest.mark.parity

ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def test_every_family_is_here():
    """OpenELM, which transformers lacks, has its golden files (test_openelm.py)."""
    assert {config.model_type for config in CONFIGS.values()} | {"openelm"} == set(FAMILIES)


@ALL
def test_logits_and_export(tmp_path, config):
    model = build(config)
    model.save_pretrained(tmp_path / "a")
    wanted = torch_logits(model, TOKENS)
    ours = load_pretrained(tmp_path / "a", LizaConfig(writes="all"), LoraConfig(rank=2))
    assert relative_error(plain_logits(ours), wanted) <= 1e-5
    export_pretrained(ours, tmp_path / "b", source=tmp_path / "a")
    exported = reload(tmp_path / "b")
    np.testing.assert_array_equal(torch_logits(exported, TOKENS), wanted)
    original, found = (reload(tmp_path / name).config.to_dict() for name in ("a", "b"))
    # For llama.cpp's converter; today's own configurations do not have it.
    found.pop("n_ctx", None)
    assert found | {"_name_or_path": original["_name_or_path"]} == original
    # Without the source, only what we know of the model goes along; it is enough.
    export_pretrained(ours, tmp_path / "c")
    np.testing.assert_array_equal(torch_logits(reload(tmp_path / "c"), TOKENS), wanted)


@ALL
def test_gradients(tmp_path, config):
    model = build(config)
    model.save_pretrained(tmp_path)
    errors = gradient_errors(model, load_pretrained(tmp_path))
    assert max(errors.values()) <= 1e-4, {k: v for k, v in errors.items() if v > 1e-4}


PUBLISHED_KEYS = {
    "qwen2": {"rope_theta": 5e4, "use_sliding_window": False, "sliding_window": 32},
    "qwen3": {"rope_theta": 5e4, "rope_scaling": None, "use_sliding_window": False},
    "mistral": {"rope_theta": 5e4, "sliding_window": None},
    "olmo": {"rope_theta": 5e4, "rope_scaling": None, "clip_qkv": None},
    "olmo2": {"rope_theta": 5e4, "rope_scaling": None},
    "olmoe": {"rope_theta": 5e4, "rope_scaling": None, "norm_topk_prob": False},
    "gpt2": {"n_ctx": 128},
}


def make_published(path: Path, model_type: str) -> None:
    """Rewrites config.json as the family's checkpoints on the hub have it."""
    content = json.loads((path / "config.json").read_text())
    for new in ("rope_parameters", "layer_types", "dtype"):
        content.pop(new, None)
    content |= PUBLISHED_KEYS[model_type] | {"torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("model_type", PUBLISHED_KEYS)
def test_published_configurations(tmp_path, model_type):
    config = CONFIGS[model_type]
    build(config).save_pretrained(tmp_path)
    make_published(tmp_path, model_type)
    wanted = torch_logits(reload(tmp_path), TOKENS)
    ours = load_pretrained(tmp_path)
    if model_type != "gpt2":
        assert ours.config.rope.theta == 5e4
    got = logits_of(ours, TOKENS)
    assert relative_error(got, wanted) <= 1e-5
    export_pretrained(ours, tmp_path / "b", source=tmp_path)
    np.testing.assert_array_equal(torch_logits(reload(tmp_path / "b"), TOKENS), wanted)


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["bare", "prefixed"])
def test_gpt2_keys_as_published(tmp_path, prefix):
    """Keys without the prefix, causal masks among the weights, a head beside a tied embedding."""
    from safetensors.numpy import load_file, save_file

    model = build(CONFIGS["gpt2"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {prefix + name.removeprefix("transformer."): x for name, x in tensors.items()}
    for layer in range(3):
        mask = np.tril(np.ones((1, 1, 128, 128), np.float32))
        tensors[f"{prefix}h.{layer}.attn.bias"] = mask
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.float32([-1e4])
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_pretrained(tmp_path)
    got = logits_of(ours, TOKENS)
    assert relative_error(got, torch_logits(model, TOKENS)) <= 1e-5


@pytest.mark.parametrize("name", ["olmoe", "mistral"])
def test_shards_beside_a_consolidated_file(tmp_path, name):
    model = build(CONFIGS[name]).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "consolidated.safetensors").write_bytes(b"another program's layout")
    ours = load_pretrained(tmp_path)
    got = logits_of(ours, TOKENS)
    assert relative_error(got, torch_logits(reload(tmp_path), TOKENS)) <= 1e-5
