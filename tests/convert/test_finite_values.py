"""Exports refuse weights that are NaN or infinite, by name, and write nothing."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert import ConversionError, export_pretrained, load_pretrained
from convert.formats import TensorSpec, write_weights
from convert.formats.finite_values import check_finite
from convert.loading import variables_of
from tests.convert.checkpoints import LLAMA, write_directory
from tptt_jax import LizaConfig, LoraConfig

LIZA = LizaConfig.tptt_reference("delta_rule")
LORA = LoraConfig(rank=2, targets=("q_proj",))
FINAL = "model.norm.weight (2 of 36 values)"
LAYER = "model.layers.1.mlp.up_proj.weight (1 of 1584 values)"
ADAPTER = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight (1 of 72 values)"
# What is damaged, and what the refusal has to name.
DAMAGES = {
    "merged": (LizaConfig(), ("final", "layer"), (FINAL, LAYER)),
    "titan": (
        LizaConfig(),
        ("final", "layer"),
        ("final_norm.weight (2 of 36 values)", "layers.1.mlp.up_proj.weight (1 of 1584 values)"),
    ),
    "peft": (None, ("adapter",), (ADAPTER,)),
    "tptt": (LIZA, ("final", "layer"), (f"model.{FINAL}", f"model.{LAYER}")),
}
PLACES = {
    "final": ("final_norm.weight", slice(3, 5), np.nan),
    "layer": ("stacks.0.mlp.up_proj.kernel", (1, 2, 3), np.inf),
    "adapter": ("stacks.0.self_attn.q_proj.lora.a", (2, 0, 0), -np.inf),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("base") / "m", LLAMA)


def put(model, name, index, value):
    path, variable = variables_of(model)[name]
    changed = variable.get_value().at[index].set(value)
    nnx.update(model, nnx.from_flat_state([(path, variable.replace(changed))]))


@pytest.mark.parametrize("format", DAMAGES)
def test_all_are_named_and_nothing_is_written(base, tmp_path, format):
    liza, places, named = DAMAGES[format]
    model = load_pretrained(base, liza, LORA)
    put(model, "stacks.0.self_attn.q_proj.lora.b", ..., 0.5)
    for place in places:
        put(model, *PLACES[place])
    with pytest.raises(ConversionError, match="NaN or infinite") as refusal:
        export_pretrained(model, tmp_path / "out", format, base)
    for name in named:
        assert name in str(refusal.value)
    assert "nothing was written" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_survives(base, tmp_path):
    model = load_pretrained(base)
    export_pretrained(model, tmp_path / "out", "merged", base)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    put(model, *PLACES["final"])
    with pytest.raises(ConversionError, match=r"model\.norm\.weight"):
        export_pretrained(model, tmp_path / "out", "merged", base, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_memory_that_is_not_finite(base, tmp_path):
    model = load_pretrained(base, LIZA, LORA)
    model.mag_share[...] = jnp.float32(np.nan)
    with pytest.raises(ConversionError, match="mag_share is nan"):
        export_pretrained(model, tmp_path / "out", "tptt", base)
    titan = load_pretrained(base, LizaConfig())
    name = next(each for each in variables_of(titan) if ".mag" in each)
    put(titan, name, ..., np.nan)
    with pytest.raises(ConversionError, match=r"layers\.0\.self_attn\.mag"):
        export_pretrained(titan, tmp_path / "out", "titan", base)
    assert not list(tmp_path.iterdir())


def test_a_sum_too_large_for_the_dtype(base, tmp_path):
    model = load_pretrained(base, None, LORA, np.float16)
    put(model, "stacks.0.self_attn.q_proj.lora.b", ..., 1e6)
    with pytest.raises(ConversionError, match=r"q_proj\.weight \(\d+ of 1440 values\)"):
        export_pretrained(model, tmp_path / "out", "merged", base)


def test_shards(tmp_path):
    arrays = [np.full(9, number, np.float32) for number in range(4)]
    arrays[1][3] = np.nan
    specs = [TensorSpec(f"w{i}", array.shape, array.dtype) for i, array in enumerate(arrays)]
    with pytest.raises(ConversionError, match=r"w1 \(1 of 9 values\)"):
        write_weights(tmp_path, specs, check_finite(specs, arrays), max_shard_bytes=40)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_counts_by_part(dtype):
    array = np.zeros((3000, 700), dtype)
    array[0, 0], array[2999, 699], array[1500, 5] = np.nan, np.inf, -np.inf
    arrays = {"a": array, "b": np.array(np.nan, dtype), "c": np.zeros((0, 4), dtype)}
    specs = [TensorSpec(name, each.shape, each.dtype) for name, each in arrays.items()]
    with pytest.raises(ConversionError, match=r"a \(3 of 2100000 values\), b \(1 of 1 values\);"):
        list(check_finite(specs, arrays.values()))
