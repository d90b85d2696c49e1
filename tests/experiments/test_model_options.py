"""Options of commands that say what their model is: --revision, --context, --adapter."""

import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import pytest
import yaml
from rich.console import Console

from convert import export_pretrained, load_pretrained
from convert.__main__ import main as convert_main
from experiments.command_line import resolved_yaml, run_configured
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.evaluation.runner import Runner
from experiments.evaluation.store import RowStore
from experiments.evaluation.task import Row
from experiments.evaluation.variants import COLUMNS, Source
from experiments.finetune import finetune
from experiments.generate import GenerateConfig, generate_text
from experiments.models import load_model
from experiments.training import FinetuneConfig
from experiments.training.checks import describe_run
from tests.tiny import make_tokenizer
from tptt_jax import LoraConfig, fix_context

COMMANDS: dict[str, tuple[Any, Any]] = {
    "generate": (generate_text, GenerateConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "finetune": (finetune, FinetuneConfig),
}
F32 = jnp.dtype("float32")


def refusal(name, capsys, *arguments):
    """The one line with which a command refuses."""
    assert run_configured(*COMMANDS[name], list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_revision_is_that_of_the_model(tiny_model_dir, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns, revision=None):
        asked.append((name, revision))
        return str(tiny_model_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for _, cls in COMMANDS.values():
        for model in ("some/model", "some/model@v2"):
            config = cls(model=model, revision="v2")
            assert config == cls(model="some/model@v2")
            assert dataclasses.replace(config) == config
    load_model(GenerateConfig(model="some/model", revision="v2").model, None, dtype=F32)
    (source,) = EvaluateConfig(model="some/model", revision="v2").sources
    source.load(None, None, F32)
    assert set(asked) == {("some/model", "v2")}
    # A run is of its revision, and says so in one place.
    config = FinetuneConfig(model="some/model", revision="v2")
    assert describe_run(config).source == "some/model@v2"
    saved = yaml.safe_load(resolved_yaml(config))
    assert (saved["model"], saved["revision"]) == ("some/model@v2", None)


@pytest.mark.parametrize("name", COMMANDS)
def test_revisions_that_mean_nothing_are_refused(name, tiny_model_dir, capsys):
    for model, message in (
        (("--model", "a/b@v1"), "names another revision than --revision 'v2'"),
        (("--model", tiny_model_dir), "is for models of the Hugging Face hub"),
        (("--model", "smollm2-135m"), "is for models of the Hugging Face hub"),
        ((), "hub" if name == "finetune" else "give --model"),
    ):
        assert message in refusal(name, capsys, *model, "--revision", "v2")


@pytest.fixture(scope="module")
def dynamic(tiny_model_dir, tmp_path_factory):
    """A model whose rotary frequencies change beyond 48 tokens."""
    path = tmp_path_factory.mktemp("dynamic") / "model"
    shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("README.md"))
    settings = json.loads((path / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.5}
    settings |= {"max_position_embeddings": 48, "rope_parameters": scaling, "rope_scaling": scaling}
    (path / "config.json").write_text(json.dumps(settings))
    return path


def test_long_texts_need_a_context(dynamic, tmp_path, capsys, monkeypatch):
    prompt = "The with statement is used to wrap the execution of a block. " * 3
    commands = (
        ("generate", "--model", dynamic, "--prompt", prompt),
        ("evaluate", "--model", dynamic, "--tokens", 100, "--output", tmp_path / "found"),
    )
    for command in commands:
        error = refusal(command[0], capsys, *command[1:])
        assert "change beyond 48 tokens" in error
        assert "--context" in error
        assert "at least 0" in refusal(command[0], capsys, *command[1:], "--context", -1)

    def fixing(model, tokens):
        raise ValueError(f"is fixed for {tokens}")

    monkeypatch.setattr("experiments.models.loading.fix_context", fixing)
    for command in commands:
        assert "is fixed for 777" in refusal(command[0], capsys, *command[1:], "--context", 777)


@dataclass
class Frequencies:
    """A task that measures what --context changes."""

    name: str = "frequencies"

    def rows(self, tokenizer):
        return [Row({}, None)]

    def measure(self, model, tokenizer, row, *, use_memory):
        return {"theta": model.config.rope.theta}


def test_what_was_measured_belongs_to_its_context(dynamic, tmp_path):
    def measure(context):
        settings: dict[str, Any] = {"window": None, "sinks": None, "columns": COLUMNS}
        runner = Runner(
            tasks=[Frequencies()],  # type: ignore[list-item]
            store=RowStore(tmp_path / "rows.jsonl"),
            console=Console(file=io.StringIO()),
            dtype=F32,
            **settings,
        )
        found = runner.run(Source(str(dynamic), None, context))
        return found.results["frequencies"]["full softmax"][0]["theta"]

    model = load_pretrained(dynamic)
    for context in (0, 1000, 0):
        assert measure(context) == fix_context(model, context).config.rope.theta
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_exports_are_fixed_for_a_context(dynamic, tmp_path, capsys, monkeypatch):
    def export(kind, *arguments):
        given = ["convert", "export", str(dynamic), "--output", str(tmp_path / kind), *arguments]
        monkeypatch.setattr("sys.argv", [*given, "--format", kind])
        return convert_main(), capsys.readouterr().err

    status, error = export("titan")
    assert status == 2
    assert "--context TOKENS" in error
    assert "--format merged or titan" in export("peft", "--context", "100")[1]
    expected = fix_context(load_pretrained(dynamic), 100).config.rope
    for kind in ("titan", "merged"):
        assert export(kind, "--context", "100") == (0, "")
        assert load_pretrained(tmp_path / kind).config.rope == expected


@pytest.mark.parametrize("has_settings", [True, False], ids=["complete", "partial"])
def test_the_tokenizer_of_an_adapter(tiny_model_dir, has_settings, tmp_path, capsys):
    """The template beside an adapter is used, or said not to be, however the adapter is named."""
    model = load_pretrained(tiny_model_dir, lora=LoraConfig(rank=2, targets=("q_proj",)))
    adapter = tmp_path / "adapter"
    export_pretrained(model, adapter, "peft", tiny_model_dir)
    make_tokenizer(begin=True, template="own").save_pretrained(adapter)
    if not has_settings:
        (adapter / "tokenizer_config.json").unlink()

    def template(source):
        loaded = source.load(None, None, F32)
        return loaded.tokenizer.chat_template, capsys.readouterr().err

    base, said = template(Source(str(tiny_model_dir)))
    assert said == ""
    named = "the adapter" if has_settings else "the base model"
    sources = (
        Source(None, adapter),
        Source(str(adapter)),
        Source.named(str(adapter)),
        Source(str(tiny_model_dir), adapter),
    )
    for source in sources:
        found, said = template(source)
        assert found == ("own" if has_settings else base)
        assert said.startswith(f"using the tokenizer of {named}")
        assert said.count("\n") == 1
