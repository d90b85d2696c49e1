"""Pipes, devices and directories in the place of files: one line, without blocking."""

import os
import shutil
import subprocess
import sys

import pytest

from convert import ConversionError, load_pretrained, load_tokenizer
from convert.model_card.results import find_results, read_results
from convert.sources import open_pretrained
from tests.convert.checkpoints import LLAMA, write_directory
from tests.convert.test_adapters import write_adapter_files
from tests.tiny import make_tokenizer

PLACES = {"a pipe": os.mkfifo, "a directory": os.mkdir}
PLACES["a link to a device"] = lambda path: os.symlink("/dev/zero", path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write_directory(tmp_path_factory.mktemp("special") / "m", LLAMA)
    make_tokenizer(begin=True).save_pretrained(path)
    return path


def replaced(whole, path, name, put):
    shutil.copytree(whole, path)
    (path / name).unlink(missing_ok=True)
    put(path / name)
    return path


MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    "model.safetensors.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
    ("load", "name"),
    [
        *((open_pretrained, name) for name in MODEL_FILES),
        *((load_tokenizer, name) for name in TOKENIZER_FILES),
    ],
)
def test_models_and_tokenizers(whole, tmp_path, load, name, put):
    path = replaced(whole, tmp_path / "m", name, put)
    with pytest.raises(ConversionError, match=f"{name} is a .*must be a regular file"):
        load(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(whole, tmp_path, name, put):
    path = write_adapter_files(tmp_path / "a")
    (path / name).unlink()
    put(path / name)
    with pytest.raises(ConversionError, match=name):
        load_pretrained(whole, adapter=path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["m.gguf", "m"])
def test_one_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for function in (load_pretrained, load_tokenizer):
        with pytest.raises(ConversionError, match="a pipe, a device or a socket"):
            function(tmp_path / name)


def test_the_command_says_one_line(whole, tmp_path):
    path = replaced(whole, tmp_path / "m", "config.json", os.mkfifo)
    done = subprocess.run(
        [sys.executable, "-m", "convert", "inspect", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_tokenizer_that_is_nested_deeply(whole, tmp_path):
    def put(path):
        path.write_text('{"added_tokens":' + "[" * 10_000 + "]" * 10_000 + "}")

    path = replaced(whole, tmp_path / "m", "tokenizer.json", put)
    with pytest.raises(ConversionError, match="no tokenizer that can be read"):
        load_tokenizer(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_results_of_an_evaluation(tmp_path, put):
    put(tmp_path / "results.json")
    with pytest.raises(ConversionError, match=r"results.json is a .*must be a regular file"):
        read_results(tmp_path / "results.json", "m")
    assert find_results(tmp_path) == []
