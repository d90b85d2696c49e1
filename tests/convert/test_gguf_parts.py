"""GGUF models in several files, as the gguf package writes them."""

import shutil

import gguf
import numpy as np
import pytest

from convert import ConversionError, load_pretrained
from convert.formats import GgufFile
from convert.sources import locate
from tests.convert.checkpoints import LLAMA, hf_shapes, random_tensors
from tests.convert.test_gguf_io import values_of, write_gguf

TENSORS = random_tensors(hf_shapes(LLAMA))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("whole") / "model.gguf", LLAMA, TENSORS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_gguf(folder / "model.gguf", LLAMA, TENSORS, split=len(TENSORS) // 3 + 1)
    return folder


@pytest.fixture
def parts(written, tmp_path):
    """A copy to spoil, in order."""
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_parts_are_the_whole_model(whole, parts):
    want, joined = GgufFile(whole), GgufFile(parts[0])
    for path in parts[1:]:
        assert GgufFile(path).metadata == joined.metadata
    assert {k: v for k, v in joined.metadata.items() if not k.startswith("split.")} == want.metadata
    assert joined.tensors == want.tensors
    for name in want.tensors:
        np.testing.assert_array_equal(joined.read(name), want.read(name))
    model = load_pretrained(parts[1])
    for name, value in values_of(load_pretrained(whole)).items():
        np.testing.assert_array_equal(values_of(model)[name], value, err_msg=name)


def test_any_part_or_the_directory_names_the_model(parts):
    for source in (*parts, parts[0].parent, str(parts[2])):
        assert locate(source) == parts[0]


def test_a_directory_with_one_whole_file(whole):
    assert locate(whole.parent) == whole


def test_a_directory_with_two_models_is_refused(parts, whole):
    shutil.copy(whole, parts[0].with_name("other.gguf"))
    with pytest.raises(ConversionError, match=r"several GGUF models \(model in 3 parts, other"):
        locate(parts[0].parent)
    assert locate(parts[1]) == parts[0]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_part_is_named(parts, gone):
    parts[gone].unlink()
    for source in (parts[gone - 1], parts[0].parent):
        with pytest.raises(ConversionError, match=rf"one of 3 parts; {parts[gone].name} must be"):
            load_pretrained(source)


def test_parts_must_have_their_own_names(parts):
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])
    with pytest.raises(ConversionError, match=r"00002-of-00003\.gguf must be part 2 of 3 by its"):
        GgufFile(parts[0])
    alone = parts[0].rename(parts[0].with_name("alone.gguf"))
    with pytest.raises(ConversionError, match="keep the names"):
        GgufFile(alone)


def test_parts_of_another_model_are_refused(parts):
    writer = gguf.GGUFWriter(parts[2], "llama")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.0.attn_q.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match=r"attn_q\.weight, which another part also has"):
        GgufFile(parts[0])


def test_a_wrong_total_is_refused(parts):
    content = bytearray(parts[0].read_bytes())
    key = b"split.tensors.count"
    place = content.index(key) + len(key) + 4
    content[place] += 1
    parts[0].write_bytes(content)
    with pytest.raises(ConversionError, match=rf"have {len(TENSORS)} tensors, but declare"):
        GgufFile(parts[0])
