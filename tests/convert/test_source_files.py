"""Files that an export copies from the model's directory."""

import json
import os

import pytest

from convert import ConversionError, export_pretrained, load_pretrained
from convert.sources.source_files import TOKENIZER_FILES, copy_tokenizer_files, report_skipped_files
from convert.tokenizers import export_tokenizer
from tests.convert.checkpoints import LLAMA, write_directory

CODE = {"AutoModelForCausalLM": "modeling_mine.Mine"}
STRANGERS = ("modeling_mine.py", "tokenizer_mine.py", "pytorch_model.bin", "notes.md", "tokenizer")


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
    assert said.startswith("exports copy only tokenizer files; left out: ")
    for name in (*STRANGERS, "onnx/"):
        assert name in said
    assert "tokenizer.json" not in said
    assert "model.safetensors" not in said


def test_links_out_of_the_folder_are_not_followed(source, tmp_path, capsys):
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    for name in ("generation_config.json", "chat_template.json"):
        (source / name).unlink()
        (source / name).symlink_to(secret)
    (source / "additional_chat_templates" / "x.jinja").symlink_to(secret)
    (source / "added_tokens.json").unlink()
    (source / "added_tokens.json").symlink_to("vocab.json")
    export_pretrained(load_pretrained(source), tmp_path / "a", "merged", source)
    content = b"".join(path.read_bytes() for path in (tmp_path / "a").rglob("*.j*"))
    assert b"secret" not in content
    assert not (tmp_path / "a" / "chat_template.json").exists()
    links, others = capsys.readouterr().err.splitlines()
    assert links.startswith("links out of the model's folder are not copied: ")
    for name in ("chat_template.json", "generation_config.json", "chat_templates/x.jinja"):
        assert name in links
        assert name not in others
    assert "additional_chat_templates" not in others
    # A link inside the folder is the folder's own; the copy is a file.
    inner = tmp_path / "a" / "added_tokens.json"
    assert inner.read_bytes() == (source / "vocab.json").read_bytes()
    assert not inner.is_symlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_an_export_cannot_do_without_is_no_link(source, name, tmp_path):
    (source / name).rename(tmp_path / "outside.json")
    (source / name).symlink_to("../outside.json")
    model = load_pretrained(source)
    with pytest.raises(ConversionError, match=rf"{name} must be .* a link to .*/outside.json: rep"):
        export_pretrained(model, tmp_path / "a", "merged", source)
    assert not (tmp_path / "a").exists()


def test_links_of_the_hub_cache_are_followed(source, tmp_path, capsys):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(source.rglob("*")) if path.is_file()):
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    export_pretrained(load_pretrained(snapshot), tmp_path / "a", "merged", snapshot)
    for name in ("tokenizer.json", "additional_chat_templates/tool.jinja"):
        copy = tmp_path / "a" / name
        assert copy.read_bytes() == (snapshot / name).read_bytes()
        assert not copy.is_symlink()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["kept"] == 5
    settings = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert settings["temperature"] == 0.5
    assert "not copied" not in capsys.readouterr().err


def test_a_folder_of_a_snapshot_is_a_model_too(tmp_path):
    folder, blobs = tmp_path / "models--a--b/snapshots/abc/sub", tmp_path / "models--a--b/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text('{"a": 1}')
    (folder / "tokenizer.json").symlink_to("../../../blobs/0123")
    (tmp_path / "out").mkdir()
    copy_tokenizer_files(folder, tmp_path / "out")
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
    wrong = tmp_path / "tokenizer_config.json"
    with pytest.raises(ConversionError, match=rf"^{wrong} is not valid JSON: .* Repair it\."):
        export_tokenizer(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("content", ["", '{"model": {"vo', "[]", "[" * 100_000])
def test_a_damaged_tokenizer_is_not_exported(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=rf"^{tmp_path}/tokenizer.json is not a JSON object"):
        export_tokenizer(tmp_path, tmp_path / "out")


def test_many_strangers_are_one_short_line(tmp_path, capsys):
    for number in range(300):
        (tmp_path / f"file{number:03d}").touch()
    report_skipped_files(tmp_path)
    said = capsys.readouterr().err
    assert "file000, " in said
    assert "and 288 more" in said
    assert said.count("\n") == 1


def test_an_export_without_a_tokenizer_says_so(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer_config.json").write_text("{}")
    os.mkfifo(source / "tokenizer.json")
    export_tokenizer(source, out)
    assert capsys.readouterr().err.startswith(f"no tokenizer was written, as {source} has none")
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text("{}")
    export_tokenizer(source, out)
    assert capsys.readouterr().err == ""
