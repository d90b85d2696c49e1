"""OpenELM against outputs of its original code, and against its published parameter lists."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import ConversionError, export_pretrained, load_pretrained
from convert.formats import SafetensorsDirectory
from tests.contracts import quick_jit, relative_error
from tests.convert.published import check_published, openelm
from tptt_jax import LizaConfig, LoraConfig

GOLDEN = pytest.mark.parametrize("name", ["openelm_tied", "openelm_untied"])


@GOLDEN
def test_golden_files(shared_dir, name):
    directory = shared_dir / "golden" / name
    golden = load_file(directory / "golden.safetensors")
    # What the original code calls hidden.0 is the embedding; the last one is after the norm.
    model = load_pretrained(directory)
    output = quick_jit(lambda tokens: model(tokens)[:2])(jnp.asarray(golden["input_ids"]))
    assert relative_error(output[0], golden["logits"]) <= 1e-5
    assert relative_error(output[1], golden["hidden.4"]) <= 1e-5


@GOLDEN
def test_export_gives_the_same_tensors(shared_dir, tmp_path, name):
    directory = shared_dir / "golden" / name
    model = load_pretrained(directory, LizaConfig(softmax_window=5), LoraConfig(rank=2))
    export_pretrained(model, tmp_path / "a", source=directory)
    theirs, ours = SafetensorsDirectory(directory), SafetensorsDirectory(tmp_path / "a")
    # Untied models have a classifier that the original code makes and never uses.
    wanted = set(theirs.tensors) - {"transformer.classifier.weight"}
    assert set(ours.tensors) == wanted
    for each in wanted:
        np.testing.assert_array_equal(ours.read(each), theirs.read(each))
    assert load_pretrained(tmp_path / "a").config == model.config
    original = json.loads((directory / "config.json").read_text())
    exported = json.loads((tmp_path / "a" / "config.json").read_text())
    # The original code's own reading of both gives the same widths; the rest is unchanged.
    changed = {key for key in original if exported.get(key) != original[key]}
    changed -= {"ffn_multipliers", "ffn_dim_divisor", "qkv_multipliers", "torch_dtype"}
    assert changed == {"auto_map"}, "the golden files lack the code that it refers to"


def test_code_of_the_model_stays_behind(shared_dir, tmp_path, capsys):
    source = shutil.copytree(shared_dir / "golden" / "openelm_tied", tmp_path / "source")
    (source / "modeling_openelm.py").write_text("raise RuntimeError('never run')\n")
    export_pretrained(load_pretrained(source), tmp_path / "a", source=source)
    assert "auto_map" not in json.loads((tmp_path / "a" / "config.json").read_text())
    assert not list((tmp_path / "a").glob("*.py"))
    assert "exports copy only tokenizer files" in (said := capsys.readouterr().err)
    assert "modeling_openelm.py" in said


@pytest.mark.parametrize("targets", [("q_proj", "o_proj"), ("qkv_proj", "out_proj")])
def test_adapters_sit_on_the_fused_projection(shared_dir, targets):
    lora = LoraConfig(rank=2, targets=targets)
    model = load_pretrained(shared_dir / "golden" / "openelm_tied", lora=lora)
    paths = {path for path, x in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert {path[-3] for path in paths} == {"qkv_proj", "o_proj"}


@pytest.mark.parametrize("size", ["270M", "1_1B"])
def test_published_parameters(shared_dir, size):
    lines = (shared_dir / "golden" / f"openelm_{size}_params.tsv").read_text().splitlines()
    shapes = {}
    for line in lines:
        name, shape = line.split("\t")
        shapes[name] = tuple(json.loads(shape))
    assert check_published(openelm(size), shapes) == len(shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_multipliers": [0.5]}, "ffn_multipliers in .* must be a list of 4"),
        ({"ffn_multipliers": [0.5, 1, 2, -4]}, "ffn_multipliers"),
        ({"ffn_dim_divisor": 0}, "ffn_dim_divisor"),
        ({"num_query_heads": [2, 4, 4]}, "per_layer num_heads has 3 entries"),
        ({"num_kv_heads": [1, 3, 2, 2]}, "num_kv_heads"),
        ({"num_kv_heads": 2}, "num_kv_heads in .* must be a list of integers"),
        ({"normalization_layer_name": "layer_norm"}, "normalization_layer_name"),
    ],
)
def test_impossible_configurations(shared_dir, tmp_path, change, message):
    source = shared_dir / "golden" / "openelm_tied"
    content = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        load_pretrained(tmp_path)
