"""Bad input to the commands: exit status 2, one line with the problem, no files left."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import ConversionError, load_tokenizer
from convert.tokenizers import export_tokenizer
from tests.convert.checkpoints import GEMMA, LLAMA, hf_shapes, random_tensors, write_directory
from tests.convert.test_command_line import run_main
from tests.convert.test_gguf_io import write_gguf

LLAMA_TENSORS = random_tensors(hf_shapes(LLAMA))


def edit_config(**changes):
    return lambda path: (path / "config.json").write_text(json.dumps(LLAMA | changes))


def edit_weights(edit):
    def damage(path):
        file = path / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return damage


def lie(content):
    """Claims that one tensor is twice as long as it is."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [72]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def replace_tensors(**changes):
    def damage(path):
        named = {name.replace("__", "."): value for name, value in changes.items()}
        save_file(LLAMA_TENSORS | named, path / "model.safetensors")

    return damage


def only_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def index(**weight_map):
    def damage(path):
        places = {name.replace("__", "."): place for name, place in weight_map.items()}
        text = json.dumps({"weight_map": places})
        (path / "model.safetensors.index.json").write_text(text)

    return damage


def twice(path):
    (path / "config.json").write_text('{"model_type": "llama", "model_type": "llama"}')


NAN = np.full(36, np.nan, np.float32)
DAMAGES = {
    "truncated": (edit_weights(lambda content: content[:-5]), "truncated"),
    "empty": (edit_weights(lambda content: b""), "too few"),
    "lying header": (edit_weights(lie), "model.norm.weight"),
    "huge header": (edit_weights(lambda c: b"\xff" * 8 + c[8:]), "claims a header"),
    "wrong shape": (replace_tensors(model__norm__weight=np.ones(7, np.float32)), "[7] instead of"),
    "NaN": (replace_tensors(model__norm__weight=NAN), "in model.norm.weight"),
    "integers": (replace_tensors(model__norm__weight=np.ones(36, np.int8)), "has type I8"),
    "another tensor": (replace_tensors(x=np.ones(2, np.float32)), "unexpected: x"),
    "pickles": (only_pickle, "save_pretrained(OTHER_DIR)"),
    "index outside": (index(x="../a.safetensors"), "not a file name inside"),
    "index to nothing": (index(x="b.safetensors"), "lacks the shards b.safetensors"),
    "no config": (lambda path: (path / "config.json").unlink(), "no such file"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
    "duplicate key": (twice, "names model_type more than once"),
    "unknown family": (edit_config(model_type="mamba"), "'mamba' is not supported; supported:"),
    "unknown rope": (edit_config(rope_scaling={"rope_type": "spiral"}), "rope type 'spiral'"),
    "a million layers": (edit_config(num_hidden_layers=10**6), "at most 10000"),
    "a trillion tokens": (edit_config(vocab_size=10**12), "vocab_size"),
    "quantised": (edit_config(quantization_config={}), "original checkpoint"),
}


def check_refused(status, captured, message, output):
    assert status == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not output.exists()
    assert [each.name for each in output.parent.iterdir()] == ["m"]


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("command", ["import", "inspect", "verify"])
def test_damaged_directories(tmp_path, monkeypatch, capsys, command, damage, message):
    if command == "inspect" and message in ("in model.norm.weight", "[7] instead of"):
        pytest.skip("inspect reads no weights and compares no shapes")
    if command == "inspect" and message in ("has type I8", "unexpected: x"):
        pytest.skip("inspect shows what is there")
    path, output = write_directory(tmp_path / "m", LLAMA, LLAMA_TENSORS), tmp_path / "out"
    damage(path)
    arguments = ("--output", output) if command == "import" else ()
    status, captured = run_main(monkeypatch, capsys, command, path, *arguments)
    check_refused(status, captured, message, output)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content[:500], "is not a readable GGUF file"),
        (lambda content: content[:-2000], "fetch it again"),
        (lambda content: b"GGUF\3\0\0\0" + b"\xff" * 16, "is not a readable GGUF file"),
        (lambda content: b"", "is not a readable GGUF file"),
        (lambda content: content.replace(b"gemma3", b"gemmaX"), "'gemmaX' is not supported"),
    ],
    ids=["header cut", "tensors cut", "absurd counts", "empty", "unknown architecture"],
)
@pytest.mark.parametrize("command", ["import", "inspect", "verify"])
def test_damaged_gguf_files(tmp_path, monkeypatch, capsys, command, edit, message):
    path, output = tmp_path / "m", tmp_path / "out"
    write_gguf(path, GEMMA, random_tensors(hf_shapes(GEMMA)))
    path.write_bytes(edit(path.read_bytes()))
    arguments = ("--output", output) if command == "import" else ()
    status, captured = run_main(monkeypatch, capsys, command, path, *arguments)
    check_refused(status, captured, message, output)


def run_limited(path, output, limit=None):
    """Imports in a process that may write no file longer than `limit` bytes."""
    code = "import sys; from convert.__main__ import main; sys.exit(main())"
    if limit:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, {limit}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code, "import", str(path), "--output", str(output)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def check_no_room(done, folder, reason):
    assert done.returncode == 2, done.stderr
    *notices, error = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert reason in error
    assert all(notice.startswith("no tokenizer was written") for notice in notices)
    assert list(folder.iterdir()) == []


def test_files_over_the_limit(tmp_path):
    path, folder = write_directory(tmp_path / "m", LLAMA), tmp_path / "folder"
    folder.mkdir()
    done = run_limited(path, folder / "out", (50_000, 50_000))
    check_no_room(done, folder, "File too large")


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only the superuser can make a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path):
    path, folder = write_directory(tmp_path / "m", LLAMA), tmp_path / "disk"
    with small_disk(folder, "64k"):
        check_no_room(run_limited(path, folder / "out"), folder, "No space left on device")


def test_no_room_for_a_tokenizer(tmp_path, tiny_model_dir, monkeypatch):
    """A GGUF file's tokenizer is written by code in Rust, which raises errors of its own."""
    tokenizer = load_tokenizer(tiny_model_dir)
    monkeypatch.setattr("convert.tokenizers.loading.load_tokenizer", lambda source: tokenizer)
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    disk = tmp_path / "disk"
    with small_disk(disk, "8k"), pytest.raises(ConversionError, match="cannot be written"):
        export_tokenizer(gguf, disk)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("x" * 20_000)
    other = tmp_path / "other"
    copied = rf"source/tokenizer.json cannot be copied to {other}: No space left on device; check"
    with small_disk(other, "8k"), pytest.raises(ConversionError, match=copied):
        export_tokenizer(tmp_path / "source", other)
