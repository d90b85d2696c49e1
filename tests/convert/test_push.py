"""`python -m convert push` against a stand-in for the hub."""

import json
import re
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as st
from huggingface_hub import constants

from convert import export_pretrained, load_pretrained, load_tokenizer
from convert.__main__ import push_model
from convert.command_line import run_command
from convert.model_card import SUMMARY, SUMMARY_FORMAT
from convert.model_card.licenses import split_card
from tests.tiny import write_untrained_run
from tptt_jax import CausalLM

# The library's own upload by plain HTTP hands its client files in a way that this deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
RECIPE = {"data": "/home/someone/chats.jsonl", "steps": "0"}


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory) -> Path:
    """A run that has finished, without a step."""
    folder = write_untrained_run(tmp_path_factory.mktemp("runs") / "mine", tiny_model_dir)
    summary = {"step": 0, "command": "finetune", "recipe": RECIPE, "settings": {"steps": 0}}
    (folder / SUMMARY).write_text(json.dumps({"format": SUMMARY_FORMAT} | summary))
    (folder / "metrics.jsonl").write_text("")
    (folder / "run.lock").write_text("")
    return folder


@pytest.fixture(scope="module")
def merged(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "plain"
    export_pretrained(load_pretrained(tiny_model_dir), folder, "merged", tiny_model_dir)
    return folder


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("adapters") / "lora", load_pretrained(run)
    model.stacks[0].self_attn.q_proj.lora.b[...] += 1.0
    export_pretrained(model, folder, "peft", run)
    return folder


def push(*arguments: object) -> int:
    return run_command(push_model, [str(each) for each in arguments], prog="convert push")


def logits(model: CausalLM) -> np.ndarray:
    return np.asarray(model(jnp.arange(40)[None] % 400 + 4).logits)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_run_arrives_with_its_memory_and_loads_from_the_hub(run, hub, tiny_model_dir, capsys):
    assert push(run, "tiny") == 0
    files = hub.files("me/tiny")
    assert f"{hub.url}/me/tiny/commit/" in capsys.readouterr().out
    assert len(hub.repositories["me/tiny"].commits) == 1
    assert {"config.json", "model.safetensors", "modeling_titan.py", "README.md"} < files.keys()
    assert not {"metrics.jsonl", "run.lock", "checkpoint.json", SUMMARY} & files.keys()
    head, card = split_card(files["README.md"].decode())
    assert head["model_name"] == "me/tiny"
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in card
    assert "| data | chats.jsonl |" in card
    texts = [data for name, data in files.items() if not name.endswith(".safetensors")]
    for place in (str(run.parent), str(tiny_model_dir.parent), "/home/someone"):
        assert all(place.encode() not in data for data in texts)
    np.testing.assert_allclose(logits(load_pretrained("me/tiny")), logits(load_pretrained(run)))
    fetched, own = load_tokenizer("me/tiny"), load_tokenizer(tiny_model_dir)
    assert fetched("The with statement")["input_ids"] == own("The with statement")["input_ids"]


def test_a_directory_arrives_byte_for_byte_and_replaces_an_earlier_export(merged, adapter, hub):
    (merged / "__pycache__").mkdir(exist_ok=True)
    (merged / "__pycache__" / "x.pyc").write_bytes(b"")
    assert push(merged, "team/model", "--private") == 0
    sent, found = contents(merged), hub.files("team/model")
    sent.pop("__pycache__/x.pyc")
    card = sent.pop("README.md").decode()
    assert '("plain")' in card
    assert found.pop("README.md").decode() == card.replace('"plain"', '"team/model"').replace(
        "# plain\n", "# team/model\n"
    ).replace("model_name: plain", "model_name: team/model")
    assert found == sent
    assert hub.repositories["team/model"].private
    found["notes.md"] = b"of the user"
    assert push(adapter, "team/model") == 0
    assert {"notes.md", "adapter_model.safetensors", "adapter_config.json"} < found.keys()
    assert not {"model.safetensors", "config.json"} & found.keys()
    # The base model is a folder here, so nobody else can load it by name.
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] is None
    assert str(adapter.parent).encode() not in found["README.md"]


def test_a_branch_is_made(merged, hub):
    assert push(merged, "me/model", "--revision", "v2") == 0
    assert hub.files("me/model") == {}
    assert "config.json" in hub.files("me/model", "v2")


FAULTS = {
    "no token": (
        lambda hub, patch: patch.delenv("HF_TOKEN"),
        "me/model cannot be pushed to: there is no token; set HF_TOKEN",
    ),
    "wrong token": (
        lambda hub, patch: patch.setenv("HF_TOKEN", "hf_wrong"),
        "the hub does not accept the token (401); set HF_TOKEN to one with write access from ",
    ),
    "a token that reads": (
        lambda hub, patch: hub.account["auth"]["accessToken"].update(role="read"),
        "the token can only read",
    ),
    "another's": (
        lambda hub, patch: hub.account.update(name="you", orgs=[]),
        "the token is that of you, not of me; give you/model",
    ),
    "offline": (
        lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
        "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it",
    ),
    "no server": (
        lambda hub, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"),
        "no answer from http://127.0.0.1:9 (",
    ),
    "403": (
        lambda hub, patch: hub.failures.update({"repos/create": 403}),
        "me/model was not pushed: the token may not write to me/model (403); take one with ",
    ),
    "404": (
        lambda hub, patch: hub.failures.update({"preupload": 404}),
        "me/model was not pushed: the hub does not find me/model or this revision of it (404)",
    ),
    "500": (
        lambda hub, patch: hub.failures.update({"commit": 500}),
        "me/model was not pushed: the hub has a fault (status 500); try again later",
    ),
    "dropped": (
        lambda hub, patch: hub.failures.update({"PUT /lfs": None}),
        "check the network and HF_ENDPOINT, and try again later",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_one_line_with_the_command_that_pushes_again(
    fault, merged, hub, monkeypatch, capsys
):
    make, message = FAULTS[fault]
    # The library waits between its own tries.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    make(hub, monkeypatch)
    before = contents(merged)
    assert push(merged, "me/model") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert f"to push it: python -m convert push {merged} me/model" in line
    assert contents(merged) == before
    assert not hub.repositories or not hub.files("me/model")


@pytest.mark.parametrize("name", ["a/b/c", "my model", "me/x--y", "", "me/x.git"])
def test_a_wrong_id_is_refused_before_anybody_is_asked(name, merged, hub, capsys):
    assert push(merged, name) == 2
    assert "cannot be the ID of a repository" in capsys.readouterr().err
    assert hub.requests == []


def spoil(kind, folder):
    if kind == "logs":
        (folder / "metrics.jsonl").write_text("")
    elif kind == "link":
        (folder / "vocab.json").symlink_to(folder.parent / "secret")
    elif kind == "weights":
        weights = st.load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] = np.nan
        st.save_file(weights, folder / "model.safetensors")
    else:
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("logs", "also holds metrics.jsonl, which is not part of an export"),
        ("link", "vocab.json in .* lead to files outside it"),
        ("weights", r"holds NaN or infinite values in model.norm.weight \(1 of "),
        ("nothing", "is no exported model"),
    ],
)
def test_what_must_not_be_published_is_refused(kind, message, merged, hub, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(merged, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "secret").write_text("{}")
    spoil(kind, folder)
    assert push(folder, "me/model") == 2
    assert re.search(message, capsys.readouterr().err)
    assert hub.requests == []


def test_an_unfinished_run_is_refused(run, hub, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / SUMMARY).unlink()
    assert push(folder, "me/model") == 2
    line = capsys.readouterr().err
    assert "has not finished (its last step is 0): finish it with python -m experiments." in line
    assert hub.requests == []
