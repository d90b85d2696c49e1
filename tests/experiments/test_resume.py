"""Resuming a run: permitted changes, refusals by name, and files that stay."""

import contextlib
import io
import json
import os
import pkgutil
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as st
from rich.console import Console

from convert import load_pretrained
from convert.__main__ import main
from experiments.command_line import parse_arguments, run_configured
from experiments.data import DataConfig
from experiments.data.data_files import find_data
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.finetune import finetune
from experiments.generate import GenerateConfig, generate_text
from experiments.models import load_model
from experiments.process.distributed import DistributedConfig
from experiments.process.interrupts import TerminationError
from experiments.training import FinetuneConfig
from experiments.training.checks import check_output, describe_run
from experiments.training.config import FitConfig, OptimizerConfig, ShareConfig
from experiments.training.outcome import Outcome
from experiments.training.prepare import prepare_run
from experiments.training.resume import Resumption
from experiments.training.resume.fingerprints import is_same_data, of_data
from experiments.training.resume.settings import (
    flag_of,
    flag_with_value,
    flat_settings,
    is_compared,
)
from tests.tiny import write_tiny_model, write_untrained_run
from tptt_jax.config import LizaConfig, LoraConfig
from tptt_jax.training.checkpoint import latest_step, restore_trainable
from tptt_jax.training.description import Description, write_description


@pytest.fixture(scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outcome, "plot", lambda self: None)
        yield


def run(config: FinetuneConfig) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        finetune(config)
    return out.getvalue()


@pytest.fixture(scope="module")
def started(tmp_path_factory, no_pictures):
    """A complete run of two steps on a table, of a model and with data of its own."""
    folder = tmp_path_factory.mktemp("run [b]")
    rows = folder / "rows [1].jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in range(2, 22)))
    config = FinetuneConfig(
        model=str(write_tiny_model(folder / "model")),
        output=folder / "exp[1]",
        data=DataConfig(path=str(rows), sequence_length=32, packing=False, eval_rows=0.2),
        no_liza=True,
        lora=LoraConfig(rank=2),
        steps=2,
        sample_tokens=0,
    )
    run(config)
    return config


def contents(folder):
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def counting(monkeypatch, name):
    """What a function of one module is called with."""
    calls, function = [], pkgutil.resolve_name(name)

    def called(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(name, called)
    return calls


def test_a_complete_run_says_so_and_changes_nothing(started, monkeypatch):
    before = contents(started.output)
    hashed = counting(monkeypatch, "tptt_jax.training.step_folders._digest")
    printed = run(started)
    # Every file of the checkpoint once, although it is looked for before it is read.
    assert len(hashed) == len(set(hashed)) > 0
    assert f"the run in {started.output} has done all its steps (2; --steps 2)" in printed
    assert "resuming" not in printed
    assert contents(started.output) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.learning_rate": 0.01}, r"learning_rate: 0.001 in the run, 0.01 now: give "),
        ({"optimizer.learning_rate": 0.01}, r"give --learning-rate 0.001, allow it with --resum"),
        ({"optimizer.lr_schedule": "linear"}, r"lr_schedule: cosine in the run, linear now"),
        ({"seed": 1, "batch_size": 3}, r"batch_size: 2 in .*; seed: 0 in the run, 1 now"),
        ({"data.sequence_length": 16}, r"data.sequence_length: 32 in .*--data.sequence-length 32"),
        ({"data.path": "python-docs"}, r"data.path: .*rows \[1\].jsonl \(.* bytes.* python-docs n"),
        ({"lora": LoraConfig(rank=3)}, r"\(lora.rank: 2 in the run, 3 now\): use another --outp"),
        ({"resume_allow": ("rate",)}, r"--resume-allow has no setting 'rate': choose from .*seed"),
        ({"resume_allow": ("learning-rat",)}, r"'learning-rat': did you mean learning_rate\?"),
        ({"data.packing": True}, r"give --data.no-packing, allow"),
        ({"data.columns": ("text=a b",)}, r"leave --data.columns out, allow"),
        ({"data.path": "python-docs"}, r"data.path held_out \(other rows would be held out\), or "),
    ],
)
def test_what_changes_the_run_is_refused_by_name(changes, message, started):
    before = contents(started.output)
    changed = replace(started, steps=4)
    for path, value in changes.items():
        block, _, name = path.rpartition(".")
        change = {name: value}
        if block:
            change = {block: replace(getattr(changed, block), **change)}
        changed = replace(changed, **change)
    with pytest.raises(ValueError, match=message):
        run(changed)
    assert contents(started.output) == before


def test_a_changed_data_file_is_refused_until_it_is_allowed(started):
    rows = started.data.path
    with open(rows, "a") as file:
        file.write('{"text": "one more"}\n')
    try:
        with pytest.raises(ValueError, match=r"data.path: .* bytes, sha256 .* in the run"):
            run(replace(started, steps=4))
        # Another table has other rows held out, which is a name of its own.
        expected = r"held_out: rows \w+ in the run, rows \w+ now: .*add held_out to --resume-all"
        with pytest.raises(ValueError, match=expected):
            run(replace(started, steps=4, resume_allow=("data",)))
    finally:
        os.truncate(rows, os.path.getsize(rows) - len('{"text": "one more"}\n'))


def test_changed_base_weights_are_refused(started):
    (file,) = [f for f in os.listdir(started.model) if f.endswith(".safetensors")]
    path = os.path.join(started.model, file)
    kept = Path(path).read_bytes()
    weights = st.load_file(path)
    name = next(name for name in sorted(weights) if "q_proj" in name)
    st.save_file(weights | {name: weights[name] * 2}, path, {"format": "pt"})
    try:
        with pytest.raises(ValueError, match=r"base: .*q_proj|first .*q_proj"):
            run(replace(started, steps=4))
        # The same for those who load the run; another --model is meant.
        expected = r"1 tensors of .*model are not those that .*first .*q_proj.*: restore the base"
        with pytest.raises(ValueError, match=expected):
            load_pretrained(started.output)
        with pytest.raises(ValueError, match=expected):
            load_model(None, started.output, dtype=jnp.dtype("float32"))
        assert load_model(
            str(Path(started.model)) + "/", started.output, dtype=jnp.dtype("float32")
        )
        st.save_file(weights | {name: weights[name] * np.nan}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=r"NaN"):
            run(replace(started, steps=4))
    finally:
        Path(path).write_bytes(kept)


def test_an_allowed_change_is_written_down_and_the_same_rows_stay_held_out(started):
    before = json.loads((started.output / "run.json").read_text())
    measured = json.loads((started.output / "evaluation.json").read_text())
    changed = replace(started, steps=3, seed=5, optimizer=OptimizerConfig(learning_rate=0.01))
    printed = run(replace(changed, resume_allow=("learning-rate", "seed")))
    assert "step: resuming after 2 of 3" in printed
    after = json.loads((started.output / "run.json").read_text())
    assert after["held_out"] == before["held_out"]
    assert (after["seed"], after["rows"]) == (0, before["rows"])
    again = json.loads((started.output / "evaluation.json").read_text())
    assert again["before"] == measured["before"]
    # Other steps, another end.
    assert again["after"]["counts"] == measured["after"]["counts"]
    assert again["after"]["nats"] != measured["after"]["nats"]
    notes = (started.output / "config.yaml").read_text().splitlines()[:2]
    assert notes == [
        "# after step 2, by --resume-allow: learning_rate 0.001 -> 0.01",
        "# after step 2, by --resume-allow: seed 0 -> 5",
    ]
    # From then on it is the run's own.
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 in the run, 0.001 now"):
        run(started)
    assert "has done all its steps (3; --steps 3): nothing is trained" in run(changed)


def test_what_was_measured_at_an_earlier_end_is_gone_before_the_run_goes_on(started, tmp_path):
    longer = replace(
        started, output=tmp_path / "run", steps=9, resume_allow=("learning_rate", "seed")
    )
    shutil.copytree(started.output, longer.output)
    saved = longer.output / "evaluation.json"
    assert json.loads(saved.read_text()).keys() >= {"before", "after"}
    Outcome(prepare_run(longer, Console(file=io.StringIO())))
    assert "after" not in json.loads(saved.read_text())
    assert "before" in json.loads(saved.read_text())


def test_a_rate_that_explodes_keeps_the_last_finite_state(started, tmp_path):
    data = replace(started.data, eval_rows=0.0)
    rate = OptimizerConfig(learning_rate=1e30, warmup_steps=0)
    exploding = replace(started, output=tmp_path / "run", data=data, optimizer=rate)
    with pytest.raises(
        ValueError, match=r"step 2 is not finite \(loss .*, packed rows \d+, \d+\)"
    ) as no:
        run(exploding)
    remedy = "--learning-rate below 1e+30 and --resume-allow learning_rate, or leave such steps out"
    assert f"{remedy} with --non-finite skip;" in str(no.value)
    assert "the state after step 1 is kept" in str(no.value)
    assert latest_step(exploding.output) == 1
    model = load_pretrained(started.model, None, started.lora)
    assert restore_trainable(exploding.output, model) == 1
    # Resuming is not stuck: the state before the step is the one to go on from.
    again = replace(exploding, optimizer=replace(rate, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"step 2 is not finite"):
        run(replace(again, resume_allow=("learning_rate",)))


def test_what_a_run_needs_is_not_its_output(started, tmp_path):
    description = Description(source=str(started.output), liza=None, lora=None, train="lora")
    write_description(tmp_path / "on top", description)
    second = replace(started, model=str(tmp_path / "on top"), resume=False)
    with pytest.raises(ValueError, match=r"exp\[1\] is needed by .*on top"):
        check_output(second, describe_run(second), None)
    fresh = replace(started, output=tmp_path / "new")
    (fresh.output / "distill").mkdir(parents=True)
    (fresh.output / "distill" / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match="checkpoints is a file, but must be a directory"):
        check_output(fresh, describe_run(fresh), None)


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "The same command resumes the run, or:\n  python -m experiments.finetune --config "),
        (
            {"resume": False},
            "The same command without --no-resume resumes the run, or:\n  python -m ",
        ),
        ({"distributed": DistributedConfig(enabled=True)}, "The same command resumes the run.\n"),
    ],
    ids=["resume", "no resume", "distributed"],
)
def test_what_a_stopped_run_prints_resumes_it(changes, command, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    config = FinetuneConfig(data=DataConfig(path=str(rows)), output=tmp_path, **changes)

    def stop(*_):
        Resumption(config).write()
        raise TerminationError("stopped")

    monkeypatch.setattr("experiments.finetune._finetune", stop)
    monkeypatch.setattr("experiments.finetune.joined", contextlib.nullcontext)
    assert finetune(config)["terminated"] == "stopped"
    assert f"nothing is lost. {command}" in capsys.readouterr().out
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")], FinetuneConfig).resume


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("data.path", "--data"),
        ("data.eval_rows", "--data.eval-rows"),
        ("fit.length", "--fit-length"),
        ("fit.distill_batch_size", "--distill-batch-size"),
        ("mag_values", "--mag-values"),
    ],
)
def test_flags_of_settings(name, flag):
    assert flag_of(name) == flag


def test_every_remedy_can_be_typed():
    changed = FinetuneConfig(
        data=DataConfig(packing=False, columns=("text=a b",), text_column="it's", loss="all"),
        fit=FitConfig(steps=3, length=99),
        window_range=(4, 8),
        liza=LizaConfig(softmax_window=8),
        share=ShareConfig(mag_values=(0.25, 0.5)),
        epochs=2.0,
        optimizer=OptimizerConfig(learning_rate=3e-5),
    )
    for config in (FinetuneConfig(), changed):
        asked = flat_settings(config)
        names = [name for name in asked if is_compared(name)]
        given = [flag_with_value(name, asked[name]) for name in names]
        line = " ".join(["--liza.softmax-window 8", *(each for each in given if each)])
        parsed = flat_settings(parse_arguments(shlex.split(line), FinetuneConfig))
        assert [parsed[name] for name in names] == [asked[name] for name in names]
    assert flag_with_value("data.columns", []) is None


# --- what a folder of data holds ----------------------------------------------------------------


def test_a_folder_of_data_may_hold_the_run(started, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(started.data.path, folder / "train.jsonl")
    (folder / "test.jsonl").write_text('{"text": "not read"}\n')
    data = replace(started.data, path=str(folder))
    inside = replace(started, output=folder / "run", data=data, steps=9)
    # The same rows by another name.
    shutil.copytree(started.output, inside.output)
    inside = replace(inside, resume_allow=("learning_rate", "seed"))
    searched = counting(monkeypatch, "experiments.data.data_files._find_in_folder")
    rows = prepare_run(inside, Console(file=io.StringIO())).data.train
    assert len(searched) == 1
    # Nor is what is not read compared.
    (folder / "test.jsonl").write_text('{"text": "something else"}\n')
    again = prepare_run(inside, Console(file=io.StringIO())).data.train
    np.testing.assert_array_equal(again.tokens, rows.tokens)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"data.path: .* in the run"):
        prepare_run(inside, Console(file=io.StringIO()))


def test_names_of_data_are_not_compared(started, tmp_path):
    first, second = tmp_path / "a [1].jsonl", tmp_path / "b.jsonl"
    first.write_text('{"text": "a"}\n')
    second.write_text('{"text": "b"}\n')

    def named(*paths):
        return of_data(find_data([str(path) for path in paths]))

    both = named(first, second)
    assert is_same_data(both, named(tmp_path / "*.jsonl"))
    assert not is_same_data(both, named(second, first))
    assert is_same_data(named(first), named(tmp_path / "a*"))


# --- what other commands do with a damaged run -----------------------------------------------


def damage(run, step):
    files = (run / "checkpoints" / str(step) / "weights").rglob("*")
    max(files, key=lambda file: file.stat().st_size).write_bytes(b"")


def test_commands_take_the_checkpoint_before_or_say_that_there_is_none(
    started, tmp_path, monkeypatch, capsys
):
    output = write_untrained_run(tmp_path / "run [1]", Path(started.model))
    checkpoints = output / "checkpoints"
    shutil.copytree(checkpoints / "0", checkpoints / "1")
    damage(output, 1)
    export = ["convert", "export", str(output), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", export)
    assert main() == 0
    # After it stands what the export leaves out.
    line, *_ = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint 1 in {checkpoints} cannot be read (")
    assert line.endswith("taking that of step 0")
    damage(output, 0)
    monkeypatch.setattr("sys.argv", [*export, "--overwrite"])
    flags = ["--adapter", str(output)]
    for command in (
        main,
        lambda: run_configured(generate_text, GenerateConfig, flags),
        lambda: run_configured(
            evaluate, EvaluateConfig, [*flags, "--output", str(tmp_path / "evaluation")]
        ),
    ):
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: no checkpoint in {checkpoints} can be read (step 1: ")
    assert not (tmp_path / "evaluation").exists()
