"""Round trips of `format="tptt"`, tensor by tensor, for every family."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert import export_pretrained, load_pretrained
from convert.families import FAMILIES
from convert.families.fields import Fields
from convert.loading import variables_of
from tests.convert.checkpoints import OLMOE, write_directory
from tests.convert.tiny_families import CONFIGS
from tptt_jax import CausalLM, LizaConfig, LoraConfig

LIZA = LizaConfig.tptt_reference("delta_rule", mag_init=0.25)
LORA = LoraConfig(rank=2, targets=("o_proj",))
ONE_PER_FAMILY = [name for name in CONFIGS if "," not in name]


def write_base(path, name):
    """A tiny base model of our own making; no torch."""
    raw = json.loads(CONFIGS[name].to_json_string(use_diff=False))
    config = FAMILIES[raw["model_type"]].read_config(Fields(raw, name))
    export_pretrained(CausalLM(config, rngs=nnx.Rngs(0)), path)
    return path


def values_of(model):
    return {name: np.asarray(x.get_value()) for name, (_, x) in variables_of(model).items()}


def add(model, name, index, amount):
    path, variable = variables_of(model)[name]
    value = variable.get_value().at[index].add(amount)
    nnx.update(model, nnx.from_flat_state([(path, variable.replace(value))]))


def assert_round_trip(model, base, out):
    export_pretrained(model, out, "tptt", source=base)
    again, wanted = values_of(load_pretrained(out)), values_of(model)
    assert again.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapters"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_tensor_changed(tmp_path, name, lora):
    base = write_base(tmp_path / "base", name)
    model = load_pretrained(base, LIZA, lora)
    rng = np.random.default_rng(1)
    for each, value in values_of(model).items():
        if each != "mag_share":
            noise = rng.standard_normal(value.shape)
            add(model, each, ..., jnp.asarray(0.1 * noise, value.dtype))
    stored = assert_round_trip(model, base, tmp_path / "out")
    adapters = [each for each in stored if "lora_" in each]
    whole = load_file(base / "model.safetensors")
    assert len(stored) - len(adapters) == len(whole)
    assert bool(adapters) == (lora is not None)


# Our parameter, the part that is changed, and what the package calls the one tensor of it.
PARTS = {
    "embedding": ("embed.embedding", 5, "model.embed_tokens.weight"),
    "final norm": ("final_norm.weight", 3, "model.norm.weight"),
    "head": ("lm_head.kernel", (2, 7), "lm_head.weight"),
    "norm of a layer": ("stacks.0.mlp_norm.weight", (2, 1), "2.post_attention_layernorm.weight"),
    "router": ("stacks.0.mlp.router.kernel", (1, 0, 0), "1.mlp.gate.weight"),
    "first expert": ("stacks.0.mlp.up_proj.kernel", (0, 0), "0.mlp.experts.0.up_proj.weight"),
    "an expert": ("stacks.0.mlp.gate_proj.kernel", (1, 4), "1.mlp.experts.4.gate_proj.weight"),
    "one number": ("stacks.0.mlp.down_proj.kernel", (2, 3, 0, 0), "2.mlp.experts.3.down_proj.weig"),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("experts") / "base", OLMOE)


@pytest.mark.parametrize(("name", "index", "stored"), PARTS.values(), ids=PARTS)
def test_one_tensor_changed(experts, tmp_path, name, index, stored):
    model = load_pretrained(experts, LIZA, LoraConfig(rank=2, targets=("v_proj",)))
    add(model, name, index, 1.0)
    found = assert_round_trip(model, experts, tmp_path / "out")
    (changed,) = (each for each in found if "lora_" not in each)
    assert stored in changed
