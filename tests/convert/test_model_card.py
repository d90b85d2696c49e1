"""README.md of an export: description of the model, and results of evaluate."""

import json
from pathlib import Path

import pytest
import yaml
from flax import nnx

from convert import ConversionError, export_pretrained, load_pretrained
from convert.__main__ import export_model
from convert.command_line import run_command
from convert.model_card import find_origin, public_text, read_results, rename_card
from convert.model_card.licenses import read_base_facts
from convert.model_card.public_text import public_command
from convert.model_card.run_summary import RunSummary, measured_parts, recipe_parts
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig

ABLATE = {
    "as it is": {"perplexity": 20.0, "cost": 0.0, "error": 0.0},
    "memory": {"perplexity": 23.04, "cost": 0.1415, "error": 0.0112},
}
TASKS = {
    "ablate": {"without": ABLATE},
    "perplexity": {
        "perplexity": {"full softmax": 18.5, "memory on": 20.0},
        "standard_error": {"full softmax": 0.4, "memory on": float("nan")},
        "tokens": 8191,
    },
}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"models": {"runs/a": {"windows": {}, "tasks": TASKS}}}))
    return path


def titan():
    liza = LizaConfig(softmax_window=8, memory_rank=2)
    return CausalLM(ModelConfig.tiny(num_layers=2), liza, LoraConfig(rank=3), rngs=nnx.Rngs(0))


def card_of(directory):
    _, head, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_titans_card(tmp_path, results):
    export_pretrained(titan(), tmp_path / "my-titan", "titan", results=results)
    head, text = card_of(tmp_path / "my-titan")
    assert head["library_name"] == "transformers"
    assert "titan" in head["tags"]
    assert "# my-titan" in text
    assert 'from_pretrained("my-titan", trust_remote_code=True)' in text
    assert "LoRA of rank 3" in text
    assert "| tokens that softmax attention sees | 8 |" in text
    assert "| layers with a memory | 2 of 2 |" in text
    assert "| memory | 23.04 | +0.141 ± 0.011 |" in text
    assert "| full softmax | 18.50 ± 0.40 |" in text
    assert "| memory on | 20.00 |" in text
    assert "8,191 tokens" in text


def test_a_card_names_the_layers_whose_cache_grows(tmp_path):
    liza = LizaConfig(softmax_window=8, full_layers=(0, 2))
    model = CausalLM(ModelConfig.tiny(num_layers=3), liza, rngs=nnx.Rngs(0))
    export_pretrained(model, tmp_path / "hybrid", "titan")
    _, text = card_of(tmp_path / "hybrid")
    assert "| layers that see all tokens | 0, 2 |" in text
    assert "| layers with a memory | 1 of 3 |" in text


def test_a_merged_card_has_no_memory(tmp_path):
    export_pretrained(titan(), tmp_path / "plain", "merged")
    head, text = card_of(tmp_path / "plain")
    assert head["tags"] == ["tptt_jax"]
    assert "memory" not in text
    assert "trust_remote_code" not in text
    assert "Measured" not in text


def test_a_card_names_no_path_of_this_machine(tiny_model_dir, tmp_path):
    model = load_pretrained(tiny_model_dir)
    export_pretrained(model, tmp_path / "plain", "merged", tiny_model_dir)
    head, text = card_of(tmp_path / "plain")
    assert "base_model" not in head
    assert f"`{tiny_model_dir.name}`" in text
    assert str(tiny_model_dir.parent) not in text


def test_results_are_found_by_model(tmp_path, results):
    assert read_results(results, "whatever")["ablate"] == TASKS["ablate"]
    several = {name: {"tasks": {"n": name}} for name in ("runs/a", "runs/b")}
    results.write_text(json.dumps({"models": several}))
    assert read_results(results, "runs/b") == {"n": "runs/b"}
    with pytest.raises(ConversionError, match=r"results of runs/a, runs/b, not of c: evaluate"):
        read_results(results, "c")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"models": []}', '{"models": {"a": 1}}'])
def test_what_is_no_result_is_refused_before_anything_is_loaded(content, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    arguments = ["missing", "--output", str(tmp_path / "out"), "--results", str(path)]
    assert run_command(export_model, arguments, prog="convert") == 2
    assert "results.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapters_card_says_how_peft_loads_it(tiny_model_dir, tmp_path):
    model = load_pretrained(tiny_model_dir, None, LoraConfig(rank=2))
    model.stacks[0].self_attn.q_proj.lora.b[...] += 1.0
    export_pretrained(model, tmp_path / "lora", "peft", tiny_model_dir)
    head, text = card_of(tmp_path / "lora")
    assert head["library_name"] == "peft"
    assert 'PeftModel.from_pretrained(base, "lora")' in text
    assert 'load_pretrained("BASE_MODEL", adapter="lora")' in text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x\n---"},
            {"license": "other", "license_name": "mine", "license_link": "https://x"},
        ),
        (
            {"LICENSE": "\n  Apache License\n  Version 2.0, 2004"},
            {"license": "apache-2.0"},
        ),
        ({"LICENSE.txt": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"}, {"license": "llama3.2"}),
        ({"README.md": "---\n: [\n---\n", "LICENSE": "All rights reserved."}, {}),
        ({}, {}),
    ],
    ids=["front matter", "named", "Apache", "Llama", "unknown", "none"],
)
def test_the_licence_of_the_base_is_read_and_not_guessed(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_base_facts(tmp_path).license == expected


def test_a_gguf_header_names_the_licence(smollm_path):
    origin = find_origin("smollm2-135m", smollm_path)
    assert origin.facts.license == {"license": "apache-2.0"}
    assert origin.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_an_unknown_licence_is_said(tmp_path):
    export_pretrained(titan(), tmp_path / "plain", "merged")
    head, text = card_of(tmp_path / "plain")
    assert "license" not in head
    assert "The licence of the base model is unknown" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trained on /home/me/x.jsonl, twice", "trained on x.jsonl, twice"),
        ("~/a/b.txt and data/rows.csv", "b.txt and rows.csv"),
        ("HuggingFaceTB/SmolLM2-135M@main", "HuggingFaceTB/SmolLM2-135M@main"),
        ("tokens/s, q/k; https://x.org/a/b", "tokens/s, q/k; https://x.org/a/b"),
        ("python -m x --data=/a/b.txt --model '/c d/e'", "python -m x --data=b.txt --model 'e'"),
    ],
)
def test_folders_of_this_machine_are_left_out(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_text(text) == expected


def test_commands_keep_their_words(tmp_path, monkeypatch):
    Path(tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    command = "python -m experiments.evaluate --models runs/mine some/model --data '/a b/c.txt'"
    expected = "python -m experiments.evaluate --models mine some/model --data c.txt"
    assert public_command(command) == expected


def test_a_card_of_somebody_else_keeps_its_text():
    for text in ("# x\n", "---\ntags: [a]\n---\n# x\n"):
        assert rename_card(text, "me/x") == text


def test_a_runs_card_tells_what_the_memory_is_worth(tmp_path):
    folder = "/a secret/rows.txt"
    row = [f"with {folder} | on", "2.00"]
    summary = RunSummary(
        step=20,
        command=f"python -m experiments.finetune --config '{folder}'",
        recipe={"data": [folder, "some/data"]},
        settings={"data": {"path": folder}, "output": "/a secret/run", "steps": 20},
        measured=[{"title": f"Perplexity of {folder}", "columns": ["", "all"], "rows": [row]}],
        worth="Beyond the window of 8: perplexity 3.0 without the memory, 2.0 with it",
    )
    measured = "\n".join(measured_parts(summary, tmp_path, 12))
    assert "**Beyond the window of 8: perplexity 3.0 without the memory, 2.0 with it.**" in measured
    assert "| with rows.txt \\| on | 2.00 |" in measured
    assert "after its last step, 20; these are the weights of step 12" in measured
    recipe = "\n".join(recipe_parts(summary, 20))
    assert "| data | rows.txt, some/data |" in recipe
    assert "output" not in recipe
    assert "secret" not in measured + recipe
