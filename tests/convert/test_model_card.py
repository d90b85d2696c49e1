"""README.md of an export: description of the model, and results of evaluate."""

import json

import pytest
import yaml
from flax import nnx

from convert import ConversionError, export_pretrained, load_pretrained
from convert.__main__ import export_model
from convert.command_line import run_command
from convert.model_card import read_results
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
