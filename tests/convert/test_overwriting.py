"""--overwrite never replaces a model's own source or unrelated files."""

import json

import pytest

from convert import ConversionError, export_pretrained, load_pretrained
from convert.__main__ import main
from tests.convert.checkpoints import LLAMA, write_directory
from tptt_jax.training.description import Description, write_description


@pytest.fixture
def base(tmp_path):
    """Looks like a model, which is all that is read of it here."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def export(source, output, monkeypatch, capsys):
    argv = ["convert", "export", str(source), "--output", str(output), "--overwrite"]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("kind", ["itself", "checkpoint", "checkpoint inside", "adapter"])
def test_what_is_needed_is_not_replaced(kind, base, tmp_path, monkeypatch, capsys):
    source = base / "run" if kind.endswith("inside") else tmp_path / "run"
    if kind == "itself":
        source = base
    elif kind == "adapter":
        source.mkdir()
        config = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 2}
        config |= {"target_modules": ["q_proj"], "lora_alpha": 4}
        (source / "adapter_config.json").write_text(json.dumps(config))
    else:
        described = Description(source=str(base), liza=None, lora=None, train="full")
        write_description(source, described)
    line = export(source, base, monkeypatch, capsys)
    assert f"{base} cannot be overwritten: {source} is loaded from " in line
    assert (base / "config.json").read_text() == "{}"


def test_files_of_other_people_are_not_removed(base, tmp_path, monkeypatch, capsys):
    for name in ("model.safetensors", "tokenizer.json", "README.md", "merges.txt"):
        (base / name).touch()
    (base / "notes.txt").touch()
    line = export(tmp_path / "other", base, monkeypatch, capsys)
    assert "notes.txt" in line
    assert "merges.txt" not in line
    assert (base / "notes.txt").exists()


def test_the_python_call_protects_the_same(tmp_path):
    source = write_directory(tmp_path / "source", LLAMA)
    model = load_pretrained(source)
    with pytest.raises(ConversionError, match=r"source cannot be overwritten: .* is loaded from "):
        export_pretrained(model, source, "merged", source, overwrite=True)
    for given in (source, None):
        export_pretrained(model, tmp_path / "a", "merged", given, overwrite=True)
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(ConversionError, match=r"also holds notes.txt, which is not part of an"):
        export_pretrained(model, tmp_path / "a", "merged", source, overwrite=True)
    assert (tmp_path / "a" / "notes.txt").exists()
