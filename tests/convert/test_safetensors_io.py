import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import ConversionError
from convert.formats import SafetensorsFile, TensorSpec, write_safetensors

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-2, 2, 7, dtype=np.float16),
    "brain": np.linspace(-2, 2, 5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "wide": np.float64([1e300]),
}


def write(path, arrays):
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in arrays.items()]
    write_safetensors(path, specs, arrays.values())


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_round_trip(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert list(file.tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        read = file.read(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
        assert file.tensors[name].shape == array.shape


def test_official_package_reads_what_we_write(tmp_path):
    arrays = {name: array for name, array in ARRAYS.items() if name != "brain"}
    write(tmp_path / "a.safetensors", arrays)
    for name, array in load_file(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_official_package_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.read(name), array)


DAMAGED = {
    "empty file": (b"", None, "too few"),
    "shorter than its header": (b"\xff\x00\x00\x00\x00\x00\x00\x00{}", None, "truncated"),
    "header too large": (b"\xff" * 8, None, "at most"),
    "not JSON": (None, b"{nonsense", "not JSON"),
    "not UTF-8": (None, b'{"\xff": 1}', "not JSON"),
    "deeply nested": (None, b"[" * 100_000, "not JSON"),
    "a list": (None, b"[]", "not a JSON object"),
    "no dtype": (None, {"a": {"shape": [2], "data_offsets": [0, 8]}}, "must have dtype"),
    "entry is a number": (None, {"a": 3}, "must have dtype"),
    "unknown dtype": (None, {"a": entry(dtype="F13")}, "unknown type"),
    "dtype is a list": (None, {"a": entry(dtype=[])}, "unknown type"),
    "negative size": (None, {"a": entry(shape=(-2,))}, "impossible shape"),
    "size is true": (None, {"a": entry(shape=(True,))}, "impossible shape"),
    "three offsets": (
        None,
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}},
        "impossible offsets",
    ),
    "offsets lie about the size": (None, {"a": entry(shape=(3,))}, "needs 12 bytes"),
    "offsets backwards": (None, {"a": entry(begin=8, end=0)}, "needs 8 bytes"),
    "overlap": (
        None,
        {"a": entry(), "b": entry(begin=4, end=12)},
        "overlaps the tensor before it",
    ),
    "gap": (None, {"a": entry(), "b": entry(begin=12, end=20)}, "leaves a gap"),
    "past the end": (None, {"a": entry(shape=(4,), end=16)}, "holds 8 bytes"),
    "surplus data": (None, {"a": entry(shape=(1,), end=4)}, "holds 8 bytes"),
    "duplicate": (
        None,
        b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b' "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "a more than once",
    ),
}


@pytest.mark.parametrize(("content", "header", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(tmp_path, content, header, message):
    path = tmp_path / "bad.safetensors"
    if content is None:
        raw_file(path, header, b"\0" * 8)
    else:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS)
    content = (tmp_path / "a.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ConversionError):
            SafetensorsFile(path)


@given(st.data())
def test_no_header_makes_it_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    write(path, ARRAYS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)
    except ConversionError:
        pass


def test_integers_are_no_weights(tmp_path):
    save_file({"mask": np.ones(3, np.int8)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="not quantised"):
        file.read("mask")


def test_a_file_cut_while_open_is_noticed(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(ConversionError, match="ends inside"):
        file.read("wide")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing(tmp_path, error):
    def arrays():
        yield ARRAYS["matrix"]
        raise error

    specs = [TensorSpec(name, (3, 4), np.dtype(np.float32)) for name in ("a", "b")]
    with pytest.raises(error):
        write_safetensors(tmp_path / "a.safetensors", specs, arrays())
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, ARRAYS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(path, [TensorSpec("a", (3,), np.dtype("f4"))], [np.zeros(4, "f4")])
    assert path.read_bytes() == before


@pytest.mark.parametrize("count", [0, 2])
def test_number_of_arrays_must_fit(tmp_path, count):
    specs = [TensorSpec("a", (3,), np.dtype("f4"))]
    with pytest.raises(ValueError, match="zip"):
        write_safetensors(tmp_path / "a", specs, [np.zeros(3, "f4")] * count)
    assert list(tmp_path.iterdir()) == []
