"""Revisions of models on the hub, with a stand-in for the function that fetches them."""

import json

import pytest

from convert import ConversionError, export_pretrained, load_pretrained, load_tokenizer
from convert.__main__ import main
from convert.bases import base_source, resolve_base
from convert.sources import HubName, parse_hub_name, with_revision
from tests.convert.checkpoints import LLAMA, write_directory
from tests.convert.test_adapters import write_adapter_files
from tests.tiny import make_tokenizer
from tptt_jax import LizaConfig, LoraConfig

OTHER = LLAMA | {"num_hidden_layers": 1}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """One model with two revisions; returns what was asked for."""
    places = {None: write_directory(tmp_path / "main", LLAMA)}
    places["v2"] = write_directory(tmp_path / "v2", OTHER)
    make_tokenizer(begin=True, template="second").save_pretrained(places["v2"])
    asked = []

    def snapshot(name, allow_patterns, revision=None):
        asked.append((name, revision))
        return str(places[revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_the_revision_is_fetched(hub):
    assert load_pretrained("some/model").config.num_layers == 3
    assert load_pretrained("some/model@v2").config.num_layers == 1
    assert load_tokenizer("some/model@v2").chat_template == "second"
    assert hub == [("some/model", None), ("some/model", "v2"), ("some/model", "v2")]


def test_commands_take_an_option(hub, tmp_path, monkeypatch, capsys):
    for arguments in (
        ("inspect", "some/model", "--revision", "v2"),
        ("import", "some/model", "--output", str(tmp_path / "out"), "--revision", "v2"),
    ):
        monkeypatch.setattr("sys.argv", ["convert", *arguments, "--json"])
        assert main() == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    assert {revision for _, revision in hub} == {"v2"}
    monkeypatch.setattr("sys.argv", ["convert", "inspect", str(tmp_path), "--revision", "v2"])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --revision 'v2' is for models of the Hugging Face hub")
    assert error.count("\n") == 1


def test_an_adapter_names_the_revision_of_its_base(hub, tmp_path):
    model = load_pretrained("some/model@v2", lora=LoraConfig(rank=2, targets=("q_proj",)))
    model.stacks[0].self_attn.q_proj.lora.b[...] += 1.0
    export_pretrained(model, tmp_path / "a", "peft", "some/model@v2")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/model", "v2")
    assert base_source(tmp_path / "a") == resolve_base(tmp_path / "a") == "some/model@v2"
    assert load_pretrained(tmp_path / "a").config.num_layers == 1
    assert hub[-1] == ("some/model", "v2")


def test_the_card_and_tptt(hub, tmp_path):
    model = load_pretrained("some/model@v2", LizaConfig.tptt_reference("delta_rule"))
    export_pretrained(model, tmp_path / "a", "merged", "some/model@v2")
    assert "base_model: some/model\n" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(ConversionError, match="loads the main branch of a hub id"):
        export_pretrained(model, tmp_path / "b", "tptt", "some/model@v2")


def test_a_revision_that_leads_out_of_the_cache(tmp_path):
    for revision in ("../../x", "/etc", "a/../b", "", ".hidden", "a b", "a@b"):
        with pytest.raises(ConversionError):
            with_revision("some/model", revision)
        assert parse_hub_name(f"some/model@{revision}") is None
        path = write_adapter_files(
            tmp_path / "a", base_model_name_or_path="some/model", revision=revision or "/"
        )
        with pytest.raises(ConversionError, match="belongs to revision"):
            base_source(path)


def test_names():
    assert parse_hub_name("a/b@refs/pr/3") == HubName("a/b", "refs/pr/3")
    assert parse_hub_name("a/b/c") is None
    assert with_revision("a/b", None) == "a/b"
    assert with_revision("a/b@x", "x") == "a/b@x"
    with pytest.raises(ConversionError, match="another revision"):
        with_revision("a/b@x", "y")
    with pytest.raises(ConversionError, match="but smollm2-135m is not a hub id"):
        with_revision("smollm2-135m", "y")
