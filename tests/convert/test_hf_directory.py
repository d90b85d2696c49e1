import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import ConversionError
from convert.formats import SafetensorsDirectory, TensorSpec, write_weights
from convert.formats.hf_directory import INDEX_FILE

ARRAYS = {f"w{i}": np.full((3, i + 1), i, np.float32) for i in range(6)}
SPECS = [TensorSpec(name, array.shape, array.dtype) for name, array in ARRAYS.items()]


def shard(directory, weight_map, files):
    for name, arrays in files.items():
        save_file(arrays, directory / name)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_one_file(tmp_path):
    write_weights(tmp_path, SPECS, ARRAYS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    directory = SafetensorsDirectory(tmp_path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(directory.read(name), array)


def test_shards_hold_at_most_the_limit(tmp_path):
    write_weights(tmp_path, SPECS, ARRAYS.values(), max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert list(index["weight_map"]) == list(ARRAYS)
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    for name in names:
        held = load_file(tmp_path / name)
        assert sum(array.nbytes for array in held.values()) <= 100
        assert all(index["weight_map"][tensor] == name for tensor in held)
    directory = SafetensorsDirectory(tmp_path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(directory.read(name), array)


def test_a_tensor_over_the_limit_has_a_shard_of_its_own(tmp_path):
    write_weights(tmp_path, SPECS[-2:], list(ARRAYS.values())[-2:], max_shard_bytes=10)
    assert SafetensorsDirectory(tmp_path).tensors.keys() == {"w4", "w5"}


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "", "a\0b", 3, None],
)
def test_index_must_stay_inside(tmp_path, name):
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    shard(inside, {"w": name}, {})
    with pytest.raises(ConversionError, match="not a file name inside"):
        SafetensorsDirectory(inside)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file(ARRAYS, blobs / "0123")
    os.symlink("../blobs/0123", snapshot / "part.safetensors")
    shard(snapshot, dict.fromkeys(ARRAYS, "part.safetensors"), {})
    assert SafetensorsDirectory(snapshot).tensors.keys() == ARRAYS.keys()


def test_missing_shards_are_all_named(tmp_path):
    shard(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, {})
    with pytest.raises(ConversionError, match=r"one\.safetensors, two\.safetensors"):
        SafetensorsDirectory(tmp_path)


def test_index_must_agree_with_the_shards(tmp_path):
    shard(tmp_path, {"a": "one.safetensors"}, {"one.safetensors": {"b": np.zeros(1, "f4")}})
    with pytest.raises(ConversionError, match="do not hold: a"):
        SafetensorsDirectory(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    one = {name: {"a": np.zeros(1, "f4"), name: np.zeros(1, "f4")} for name in ("x", "y")}
    shard(tmp_path, {"x": "x", "y": "y"}, one)
    with pytest.raises(ConversionError, match="repeats tensors of other shards: a"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "a more than once"),
    ],
)
def test_damaged_index(tmp_path, content, message):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ConversionError, match=message):
        SafetensorsDirectory(tmp_path)


def test_pickles_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin.*save_pretrained"):
        SafetensorsDirectory(tmp_path)


def test_pickles_beside_safetensors_are_ignored(tmp_path):
    write_weights(tmp_path, SPECS, ARRAYS.values())
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    save_file({"other": np.zeros(1, "f4")}, tmp_path / "consolidated.safetensors")
    assert SafetensorsDirectory(tmp_path).tensors.keys() == ARRAYS.keys()


def test_nothing_there(tmp_path):
    with pytest.raises(ConversionError, match="neither"):
        SafetensorsDirectory(tmp_path)
