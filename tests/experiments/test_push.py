"""`--push-to-hub` of finetune against a stand-in for the hub."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import jax
import pytest

from convert import load_pretrained
from convert.model_card.licenses import split_card
from experiments import finetune as module
from experiments.finetune import finetune, run_finetune
from experiments.training import FinetuneConfig, prepare
from experiments.training.config import HubConfig
from experiments.training.metrics import read_metrics
from tests.tiny import write_tiny_model
from tptt_jax.training.checkpoint import latest_step

# The library's own upload by plain HTTP hands its client files in a way that this deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ROW = "a state is read with keys and written when the window has gone on "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model with a licence, and data."""
    folder = tmp_path_factory.mktemp("a secret place")
    model = write_tiny_model(folder / "base")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: some/parent\n---\n")
    (folder / "rows.jsonl").write_text((json.dumps({"text": ROW * 6}) + "\n") * 12)
    return folder


@pytest.fixture(scope="module")
def arguments(folder) -> list[str]:
    given = [
        *("--model", folder / "base", "--data", folder / "rows.jsonl", "--output", folder / "run"),
        *("--data.sequence-length", 64, "--data.eval-rows", 2, "--liza.softmax-window", 8),
        *("--liza.softmax-sinks", 2, "--no-liza", "--steps", 2),
        *("--sample-tokens", 0, "--lora.rank", 3, "--push-to-hub", "tiny"),
    ]
    return list(map(str, given))


def write_results(output: Path) -> None:
    """As `experiments.evaluate` leaves them below a run."""
    table = {"title": f"{output}: perplexity", "columns": ["position", "memory on"]}
    model = {"tasks": {}, "tables": {"perplexity": [table | {"rows": [["all", "20.00"]]}]}}
    words = ["python", "-m", "experiments.evaluate", "--models", str(output)]
    command = shlex.join([*words, "--output", str(output / "evaluate")])
    (output / "evaluate").mkdir()
    content = {"command": command, "models": {str(output): model}}
    (output / "evaluate" / "results.json").write_text(json.dumps(content))


def test_a_run_is_pushed_when_it_has_finished_and_again_when_that_failed(
    arguments, folder, hub, capsys
):
    hub.failures["commit"] = 500
    assert run_finetune(finetune, arguments) == 2
    told = capsys.readouterr()
    output = folder / "run"
    (line,) = [each for each in told.err.splitlines() if each.startswith("error: ")]
    assert "me/tiny was not pushed: the hub has a fault (status 500)" in line
    assert f"{output} is complete on disk; to push it: python -m convert push " in line
    assert latest_step(output) == 2
    write_results(output)

    hub.failures.clear()
    before = (output / "metrics.jsonl").read_bytes()
    assert run_finetune(finetune, [*arguments, "--json"]) == 0
    told = capsys.readouterr().out
    assert "nothing is trained" in told
    assert (output / "metrics.jsonl").read_bytes() == before
    pushed = json.loads(told.splitlines()[-1])["pushed"]
    assert pushed["repository"] == "me/tiny"
    assert pushed["format"] == "titan"
    files = hub.files("me/tiny")
    head, card = split_card(files["README.md"].decode())
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "some/parent"
    assert "| data | rows.jsonl |" in card
    steps = read_metrics(output / "metrics.jsonl")
    tokens = sum(each.tokens_per_s * each.seconds for each in steps)
    assert f"| tokens read in training | {round(tokens):,} |" in card
    assert "| trained | LoRA of rank 3, alpha 16" in card
    assert "| window of softmax attention | 8 |" in card
    for state in ("base model, full softmax attention", "the window alone", "after training"):
        assert f"{state} |" in card
    assert "python -m experiments.finetune --config config.yaml" in card
    # What evaluate left in the run's folder, with its command.
    assert "run: perplexity\n\n| position | memory on |\n|---|---|\n| all | 20.00 |" in card
    assert "python -m experiments.evaluate --models run --output evaluate" in card
    assert all(b"secret" not in data for data in files.values())
    assert load_pretrained("me/tiny").liza == load_pretrained(output).liza


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--push-to-hub", "a/b/c"], "'a/b/c' cannot be the ID of a repository"),
        (["--push-to-hub", "you/x"], "the token is that of me, team, not of you; give me/x"),
        (["--push-to-hub", "x", "--hub-revision", "a b"], "'a b' cannot be a branch of x"),
        (["--push-to-hub", "None", "--hub-private"], "--hub-private is for pushing to the Hub"),
    ],
)
def test_a_typo_is_refused_before_anything_is_loaded(
    changes, message, arguments, hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "load_tokenizer", None)
    output = tmp_path / "run"
    assert run_finetune(finetune, [*arguments, "--output", str(output), *changes]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not output.exists()


def test_a_format_that_cannot_hold_the_run_is_refused_before_training(
    arguments, hub, tmp_path, capsys
):
    output = tmp_path / "run"
    given = [*arguments, "--output", str(output), "--push-format", "peft", "--train", "memory"]
    assert run_finetune(finetune, given) == 2
    assert "would push format peft, but the model has no LoRA adapters" in capsys.readouterr().err
    assert not (output / "metrics.jsonl").exists()
    assert hub.repositories == {}


def test_only_the_first_process_pushes(monkeypatch):
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: ended.append(1))
    monkeypatch.setattr(module, "push_run", lambda hub, output, format: {"url": format})
    config = FinetuneConfig(hub=HubConfig(push_to_hub="me/x"))
    for is_first in (True, False):
        monkeypatch.setattr(module, "is_first_process", lambda is_first=is_first: is_first)
        with contextlib.redirect_stdout(io.StringIO()):
            report = module._push(config, "titan")
        assert report == ({"pushed": {"url": "titan"}} if is_first else {})
    # Every process leaves the group before the upload.
    assert ended == [1, 1]
