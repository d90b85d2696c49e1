"""What an export takes from the directory that the model came from."""

import json
import os

import pytest

from convert import ConversionError, export_pretrained, load_pretrained
from convert.source_files import TOKENIZER_FILES, copy_tokenizer_files, say_what_is_left_out
from tests.convert.checkpoints import LLAMA, write_directory

CODE = {"AutoModelForCausalLM": "modeling_mine.Mine"}
STRANGERS = ("modeling_mine.py", "tokenizer_mine.py", "pytorch_model.bin", "README.md", "tokenizer")


@pytest.fixture
def source(tmp_path):
    path = write_directory(tmp_path / "source", LLAMA | {"auto_map": CODE, "kept": 5})
    for name in (*TOKENIZER_FILES, *STRANGERS):
        (path / name).write_text(f'{{"name": "{name}"}}')
    (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": CODE, "eos_token": "x"}))
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (path / "onnx").mkdir()
    (path / "generation_config.json").write_text('{"temperature": 0.5}')
    return path


@pytest.mark.parametrize("format", ["merged", "titan"])
def test_a_fixed_list_of_names_and_no_code(source, tmp_path, capsys, format):
    export_pretrained(load_pretrained(source), tmp_path / "a", format, source)
    files = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.*")}
    wanted = {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *(*TOKENIZER_FILES, "additional_chat_templates/tool.jinja"),
    }
    assert files == wanted | ({"modeling_titan.py"} if format == "titan" else set())
    for name in set(TOKENIZER_FILES) - {"tokenizer_config.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "a/tokenizer_config.json").read_text()) == {"eos_token": "x"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "modeling_mine" not in json.dumps(config)
    assert config.get("kept") == (5 if format == "merged" else None)
    # The model card is ours.
    assert "name" not in (tmp_path / "a" / "README.md").read_text().split('"')
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("left out of the export")
    for name in (*STRANGERS, "onnx/"):
        assert name in said
    assert "tokenizer.json" not in said
    assert "model.safetensors" not in said


def test_links_out_of_the_folder_are_not_followed(source, tmp_path, capsys):
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    for name in ("tokenizer.json", "generation_config.json", "chat_template.json"):
        (source / name).unlink()
        (source / name).symlink_to(secret)
    (source / "additional_chat_templates" / "x.jinja").symlink_to(secret)
    (source / "added_tokens.json").unlink()
    (source / "added_tokens.json").symlink_to("vocab.json")
    export_pretrained(load_pretrained(source), tmp_path / "a", "merged", source)
    content = b"".join(path.read_bytes() for path in (tmp_path / "a").rglob("*.j*"))
    assert b"secret" not in content
    assert not (tmp_path / "a" / "tokenizer.json").exists()
    assert "tokenizer.json" in capsys.readouterr().err
    # A link inside the folder is the folder's own; the copy is a file.
    inner = tmp_path / "a" / "added_tokens.json"
    assert inner.read_bytes() == (source / "vocab.json").read_bytes()
    assert not inner.is_symlink()


def test_a_config_behind_a_link_gives_no_keys(source, tmp_path):
    (source / "config.json").rename(tmp_path / "outside.json")
    (source / "config.json").symlink_to(tmp_path / "outside.json")
    export_pretrained(load_pretrained(source), tmp_path / "a", "merged", source)
    assert "kept" not in json.loads((tmp_path / "a" / "config.json").read_text())


def test_blobs_of_the_hub_cache_are_the_models_own(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text('{"a": 1}')
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (tmp_path / "out").mkdir()
    copy_tokenizer_files(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'


def test_special_files_are_not_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    os.mkfifo(source / "tokenizer.json")
    (source / "vocab.json").mkdir()
    (source / "merges.txt").symlink_to("/dev/zero")
    (source / "chat_template.json").symlink_to("chat_template.json")
    copy_tokenizer_files(source, out)
    assert not list(out.iterdir())


def test_settings_that_are_no_json(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="Correct the tokenizer of the source"):
        copy_tokenizer_files(tmp_path, tmp_path / "out")


def test_many_strangers_are_one_short_line(tmp_path, capsys):
    for number in range(300):
        (tmp_path / f"file{number:03d}").touch()
    say_what_is_left_out(tmp_path)
    said = capsys.readouterr().err
    assert "file000, " in said
    assert "and 288 more" in said
    assert said.count("\n") == 1
