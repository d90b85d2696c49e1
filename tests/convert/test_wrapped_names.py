"""Checkpoints with names of compiled, sharded or multimodal models."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import ConversionError, load_pretrained
from convert.loading import variables_of
from tests.convert.checkpoints import LLAMA, hf_shapes, random_tensors, write_directory
from tests.convert.test_adapters import PLACES, adapter_tensors, lora_values, write_adapter_files

TENSORS = random_tensors(hf_shapes(LLAMA))


def multimodal(name):
    return name.replace("model.", "model.language_model.", 1)


def older_multimodal(name):
    return f"language_model.{name}"


def sharded(name):
    """FSDP wraps the model and every layer."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts.insert(3, "_fsdp_wrapped_module")
    return ".".join(["_fsdp_wrapped_module", *parts])


NAMES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled, a module": lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    "parallel": lambda name: f"module.{name}",
    "parallel, compiled, parallel": lambda name: f"module._orig_mod.module.{name}",
    "sharded": sharded,
    "checkpointed": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "multimodal": multimodal,
    "older multimodal": older_multimodal,
    "bare decoder of a multimodal model": lambda name: (
        name if "lm_head" in name else name.replace("model.", "language_model.", 1)
    ),
    "compiled multimodal": lambda name: f"_orig_mod.{multimodal(name)}",
}


def values(model):
    return {name: np.asarray(x.get_value()) for name, (_, x) in variables_of(model).items()}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return values(load_pretrained(write_directory(tmp_path_factory.mktemp("a") / "m", LLAMA)))


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_every_weight_is_in_its_place(tmp_path, wanted, rename):
    stored = {rename(name): value for name, value in TENSORS.items()}
    assert stored.keys() != TENSORS.keys()
    found = values(load_pretrained(write_directory(tmp_path / "m", LLAMA, stored)))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("_orig_mod.model.norm.weight", r"several names.*_orig_mod\.model\.norm\.weight, model\."),
        ("module.other.weight", r"unexpected: module\.other\.weight"),
        ("vision_tower.patch.weight", r"unexpected: vision_tower\.patch\.weight"),
    ],
)
def test_what_is_not_clear_is_named(tmp_path, extra, message):
    tensors = TENSORS | {extra: np.ones(36, np.float32)}
    with pytest.raises(ConversionError, match=message):
        load_pretrained(write_directory(tmp_path / "m", LLAMA, tensors))


ADAPTER_NAMES = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "sharded": lambda name: (
        f"module.{name.replace('self_attn.', '_fsdp_wrapped_module.self_attn.')}"
    ),
    "multimodal": lambda name: name.replace("model.layers", "model.language_model.layers"),
}


@pytest.mark.parametrize("rename", ADAPTER_NAMES.values(), ids=ADAPTER_NAMES)
def test_adapters(tmp_path, rename):
    base = write_directory(tmp_path / "base", LLAMA)
    tensors = adapter_tensors(*PLACES)
    plain = write_adapter_files(tmp_path / "plain", tensors)
    renamed = {rename(name): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    path = write_adapter_files(tmp_path / "renamed", renamed)
    wanted = lora_values(load_pretrained(base, adapter=plain))
    found = lora_values(load_pretrained(base, adapter=path))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_shards_and_an_index(tmp_path, wanted):
    stored = {f"module.{name}": value for name, value in TENSORS.items()}
    path = write_directory(tmp_path / "m", LLAMA, stored)
    names = sorted(stored)
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in halves.items():
        save_file({name: stored[name] for name in part}, path / file)
    index = {name: file for file, part in halves.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.move(path / "model.safetensors", tmp_path / "whole.safetensors")
    assert load_file(tmp_path / "whole.safetensors").keys() == stored.keys()
    found = values(load_pretrained(path))
    np.testing.assert_array_equal(found["embed.embedding"], wanted["embed.embedding"])
