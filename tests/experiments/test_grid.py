"""Grids of fine-tuning runs: their YAML, their processes, their tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from convert.command_line import run_command
from experiments.grid import run_grid
from experiments.sweep.plan import merged, nested, read_plan
from experiments.sweep.runner import Outcome
from experiments.sweep.table import markdown_table, table_rows
from tptt_jax.training.checkpoint import latest_step

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("shared_programs")
ABLATION = PROJECT / "experiments" / "configs" / "grids" / "ablation.yaml"


@pytest.fixture
def write(tmp_path):
    def file(text: str) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return path

    return file


def test_every_variant_comes_with_every_point_of_the_grid(write):
    path = write(
        "base: {steps: 3, liza: {softmax_window: 8}, data: book.txt}\n"
        "variants: {plain: {}, bare: {liza.memory_rank: 0, data.eval_tokens: 9}}\n"
        "grid: {seed: [0, 1], liza: {mag: [mass, learned]}}\n"
    )
    found = {variant.name: variant for variant in read_plan(path)}
    assert list(found)[:2] == ["plain, seed=0, liza.mag=mass", "plain, seed=0, liza.mag=learned"]
    assert len(found) == 8
    last = found["bare, seed=1, liza.mag=learned"]
    assert last.folder == "bare-seed=1-liza.mag=learned"
    assert last.settings == {
        **{"steps": 3, "seed": 1, "data": {"path": "book.txt", "eval_tokens": 9}},
        "liza": {"softmax_window": 8, "memory_rank": 0, "mag": "learned"},
    }


def test_dotted_names_and_blocks_are_the_same():
    dotted = nested({"liza.mag": "mass", "liza": {"dropout": 0.1}, "fit.data": "x"}, where="here")
    assert dotted == {"liza": {"mag": "mass", "dropout": 0.1}, "fit": {"data": "x"}}
    assert merged(dotted, {"liza": {"mag": "learned"}})["liza"] == {
        "mag": "learned",
        "dropout": 0.1,
    }


def test_the_ablation_that_comes_along_is_right():
    variants = read_plan(ABLATION)
    assert variants[0].name == "as it is"
    settings = [yaml.safe_dump(variant.settings) for variant in variants]
    assert len(set(settings)) == len(variants)


BAD = {
    "no such setting": ("variants: {a: {liza.magg: mass}}", "variant 'a': there is no option liza"),
    "no such value": ("variants: {a: {liza.mag: much}}", "variant 'a': liza.mag must be one of"),
    "impossible": ("variants: {a: {liza.memory_rank: -1}}", "variant 'a': memory_rank must be at"),
    "wrong base": ("base: {stepps: 3}\nvariants: {a: {}}", "there is no option stepps"),
    "no such block": ("variant: {a: {}}", "there is no block variant"),
    "nothing": ("base: {steps: 3}", "names no runs"),
    "no values": ("grid: {seed: []}", "grid: seed must be a list of values, got []"),
    "one value": ("grid: {seed: 3}", "grid: seed must be a list of values, got 3"),
    "no block": ("variants: [a]", "variants must be a block of names"),
    "no settings": ("variants: {a: 3}", "variant 'a' must be a block of settings, got 3"),
    "a name twice": ("variants:\n  a: {}\n  a: {seed: 1}", "line 3: 'a' occurs twice"),
    "a directory twice": ("variants: {a b: {}, a-b: {}}", "would share the directory a-b"),
    "a value twice": ("grid: {seed: [0, 0]}", "'seed=0' and 'seed=0' would share"),
    "a setting twice": ("variants: {a: {liza.mag: mass, liza: {mag: mass}}}", "liza.mag is given"),
    "a setting in a value": ("variants: {a: {steps: 3, steps.x: 1}}", "steps.x is given twice"),
    "output": ("base: {output: x}\nvariants: {a: {}}", "leave output out"),
    "no name": ("variants: {'-': {}}", "gives no directory name"),
    "no YAML": ("variants: {a: ", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_status_2_before_anything_runs(
    text, message, write, tmp_path, capsys
):
    output = tmp_path / "out"
    arguments = ["--config", str(write(text)), "--output", str(output)]
    assert run_command(run_grid, arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert len(stderr.strip().splitlines()) == 1
    assert message in stderr
    assert not output.exists()


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert run_command(run_grid, ["--config", str(tmp_path / "no.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return {
        **{"model": str(tiny_model_dir), "steps": 0, "sample_tokens": 0, "checkpoint_every": 1},
        "data": {"path": "python-docs", "sequence_length": 64, "eval_tokens": 100},
        "liza": {"softmax_window": 8},
        "fit": {"steps": 2, "distill_steps": 0, "length": 64},
    }


def test_a_grid_runs_what_is_missing_and_outlives_what_fails(base, write, tmp_path, capsys):
    variants = {"plain": {}, "broken": {"model": "/nowhere"}}
    path, output = (
        write(yaml.safe_dump({"base": base, "variants": variants}, sort_keys=False)),
        tmp_path / "out",
    )
    arguments = ["--config", str(path), "--output", str(output), "--json"]
    assert run_command(run_grid, arguments, readable=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("plain: done in ")
    assert lines[2].startswith("broken: failed after ")
    assert "no such file or directory: /nowhere" in lines[2]
    result = json.loads(lines[-1])
    assert result == json.loads((output / "results.json").read_text())
    report = result["variants"]["plain"]["report"]
    assert report["perplexity_fitted"] > 1
    assert 0 < report["gap_left"] < 2
    assert result["variants"]["broken"]["report"] is None
    head, rule, plain, broken = (output / "table.md").read_text().splitlines()
    assert head.startswith("| variant | full softmax | window alone | fitted |")
    assert rule.startswith("| --- | ---: |")
    assert f"{report['perplexity_fitted']:.2f}" in plain
    assert broken.endswith(" failed |")

    variants = {"plain": {}, "broken": {"liza.mag": "learned"}}
    path.write_text(yaml.safe_dump({"base": base, "variants": variants}, sort_keys=False))
    assert run_command(run_grid, arguments, readable=False) == 2
    error = capsys.readouterr().err
    assert f"{output}/broken holds another run (" in error
    assert "liza.mag: default in the run, learned now" in error

    path.write_text(yaml.safe_dump({"base": base, "variants": {"plain": {}}}, sort_keys=False))
    assert run_command(run_grid, arguments, readable=False) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[1].startswith("plain: already finished, perplexity fitted")
    assert json.loads(again[-1])["variants"]["plain"]["report"] == report


def test_ctrl_c_leaves_a_checkpoint_from_which_the_variant_goes_on(base, write, tmp_path, capsys):
    many = base | {"fit": base["fit"] | {"steps": 500}}
    path, output = (
        write(yaml.safe_dump({"base": many, "variants": {"a": {}}}, sort_keys=False)),
        tmp_path / "out",
    )
    arguments = ["--config", str(path), "--output", str(output)]
    command = [sys.executable, "-m", "experiments.grid", *arguments]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (output / "a" / "transfer" / "checkpoints" / "1").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted\n"
    assert not (output / "a" / "result.json").exists()
    assert (latest_step(output / "a" / "transfer") or 0) >= 1


def test_a_table_has_the_columns_that_variants_have():
    outcomes = [
        Outcome("a | b", {"perplexity_after": 2.345, "perplexity_before": 1.0}, 3.4),
        Outcome("c", None, 0.2, "no"),
    ]
    rows = table_rows(outcomes)
    assert rows[0] == ["variant", "full softmax", "trained", "seconds"]
    assert rows[1] == ["a | b", "1.00", "2.35", "3"]
    assert rows[2] == ["c", "", "", "failed"]
    assert r"| a \| b | 1.00 |" in markdown_table(rows)
