"""Every family against transformers: logits, gradients, exports; float32 on the CPU."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained
from convert.families import FAMILIES, family_of
from convert.loading import plan_for, variables_of
from tests.contracts import quick_jit
from tests.convert.tiny_families import CONFIGS
from tptt_jax import LizaConfig, LoraConfig
from tptt_jax.training.loss import causal_lm_loss

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")

from tests.parity.torch_models import (  # noqa: E402
    as_stored,
    build,
    relative_error,
    reload,
    torch_logits,
)

pytestmark = pytest.mark.parity

ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
TOKENS = np.random.default_rng(0).integers(3, 101, (2, 77))


def test_every_family_is_here():
    """OpenELM, which transformers lacks, has its golden files (test_openelm.py)."""
    assert {config.model_type for config in CONFIGS.values()} | {"openelm"} == set(FAMILIES)


@ALL
def test_logits_and_export(tmp_path, config):
    model = build(config)
    model.save_pretrained(tmp_path / "a")
    wanted = torch_logits(model, TOKENS)
    ours = load_pretrained(tmp_path / "a", LizaConfig(), LoraConfig(rank=2))
    plain = quick_jit(lambda tokens: ours(tokens, use_memory=False).logits)
    assert relative_error(plain(jnp.asarray(TOKENS)), wanted) <= 1e-5
    export_pretrained(ours, tmp_path / "b", source=tmp_path / "a")
    exported = reload(tmp_path / "b")
    np.testing.assert_array_equal(torch_logits(exported, TOKENS), wanted)
    original = reload(tmp_path / "a").config.to_dict()
    assert exported.config.to_dict() | {"_name_or_path": original["_name_or_path"]} == original
    # Without the source, only what we know of the model goes along; it is enough.
    export_pretrained(ours, tmp_path / "c")
    np.testing.assert_array_equal(torch_logits(reload(tmp_path / "c"), TOKENS), wanted)


@ALL
def test_gradients(tmp_path, config):
    model = build(config)
    model.save_pretrained(tmp_path)
    logits = model(torch.as_tensor(TOKENS)).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(TOKENS[:, 1:]).flatten()).backward()
    wanted = as_stored({name: p.grad for name, p in model.named_parameters()})
    ours = load_pretrained(tmp_path)
    gradients = loss_gradients(ours)
    rules = family_of(config.model_type).rules(ours.config)
    plan = plan_for(rules, ours.config, variables_of(ours))
    assert {name for move in plan for name in move.sources} == wanted.keys()
    for move in plan:
        stored = [wanted[name].numpy() for name in move.sources]
        arrays = move.transform.forward(stored, [slot.shape for slot in move.slots])
        for slot, array in zip(move.slots, arrays, strict=True):
            got = gradients[slot.path][slot.index]
            # A key bias moves all logits of a query alike: its gradient is zero but for rounding.
            scale = max(np.abs(array).max(), 1e-3 * np.abs(gradients[slot.path]).max(), 1e-6)
            assert np.abs(got - array).max() <= 1e-4 * scale, move.sources


def loss_gradients(model):
    """Gradient of the mean loss with respect to every parameter, by dotted path."""
    graphdef, state = nnx.split(model)
    tokens = jnp.asarray(TOKENS)

    @quick_jit
    def gradient(state):
        def loss(state):
            ones = jnp.ones_like(tokens)
            merged = nnx.merge(graphdef, state)
            total, count = causal_lm_loss(merged, tokens, ones, ones == 1, train_head=True)
            return total / count

        return jax.grad(loss)(state)

    flat = nnx.to_flat_state(gradient(state))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


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
    got = quick_jit(lambda tokens: ours(tokens).logits)(jnp.asarray(TOKENS))
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
    got = quick_jit(lambda tokens: ours(tokens).logits)(jnp.asarray(TOKENS))
    assert relative_error(got, torch_logits(model, TOKENS)) <= 1e-5


@pytest.mark.parametrize("name", ["olmoe", "mistral"])
def test_shards_beside_a_consolidated_file(tmp_path, name):
    model = build(CONFIGS[name]).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "consolidated.safetensors").write_bytes(b"another program's layout")
    ours = load_pretrained(tmp_path)
    got = quick_jit(lambda tokens: ours(tokens).logits)(jnp.asarray(TOKENS))
    assert relative_error(got, torch_logits(reload(tmp_path), TOKENS)) <= 1e-5
