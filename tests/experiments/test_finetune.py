"""Fine-tuning as a separate process: killed, interrupted, resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import load_pretrained
from experiments.command_line import run_configured
from experiments.data import DataConfig, TokenBatchSource
from experiments.finetune import finetune
from experiments.generate import GenerateConfig, generate_text
from experiments.training import FinetuneConfig
from experiments.training import text_training as module
from experiments.training.metrics import read_metrics
from tests.devices import device_environment
from tptt_jax.training.checkpoint import latest_step
from tptt_jax.training.description import read_description

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("shared_programs")


def command(module, *arguments):
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(module, *arguments, check=True, timeout=400, env=None):
    done = subprocess.run(
        command(module, *arguments),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=env,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def settings(tiny_model_dir):
    return [
        *("--model", tiny_model_dir, "--data", "python-docs", "--data.sequence-length", 64),
        *("--data.eval-tokens", 300, "--steps", 8, "--checkpoint-every", 2, "--batch-size", 2),
        *("--sample-tokens", 4, "--learning-rate", 1e-2, "--seed", 3),
        *("--liza.softmax-window", 8, "--fit-length", 64, "--fit-steps", 4, "--distill-steps", 3),
    ]


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run that nobody disturbed, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run("experiments.finetune", *settings, "--output", output, "--json")
    return output, done.stdout


def losses(output):
    return [record.loss for record in read_metrics(output / "metrics.jsonl")]


def all_losses(output):
    return {name: losses(output / name) for name in ("transfer", "distill", ".")}


def weights(output, source):
    described = read_description(output)
    from flax import nnx

    from tptt_jax.training.checkpoint import restore_trainable
    from tptt_jax.training.partition import split_trainable

    model = load_pretrained(source, described.liza, described.lora)
    assert isinstance(model, nnx.Module)
    assert restore_trainable(output, model) == 8
    return split_trainable(model, described.train)[1]


def test_a_run_leaves_everything_it_promises(finished):
    output, stdout = finished
    report = json.loads(stdout.splitlines()[-1])
    assert report["perplexity_after"] < report["perplexity_before"]
    assert report["perplexity_memory_off"] != report["perplexity_after"]
    assert [latest_step(output / name) for name in ("transfer", "distill", ".")] == [4, 3, 8]
    assert [len(found) for found in all_losses(output).values()] == [4, 3, 8]
    for picture in ("loss.png", "fit.png", "memory.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert "--- before ---" in stdout
    assert "--- after ---" in stdout
    assert "python -m experiments.generate --adapter" in stdout


def test_rows_divided_between_two_devices_train_alike(finished, settings, tmp_path):
    whole, stdout = finished
    # Held-out rows of 301 tokens are padded.
    arguments = [*settings, "--output", tmp_path / "run", "--mesh", "context=2", "--json"]
    done = run("experiments.finetune", *arguments, env=device_environment(2))
    want = all_losses(whole)
    for name, found in all_losses(tmp_path / "run").items():
        np.testing.assert_allclose(found, want[name], rtol=1e-4)
    one, two = (json.loads(x.splitlines()[-1]) for x in (stdout, done.stdout))
    for name in ("before", "window", "fitted", "after", "memory_off"):
        key = f"perplexity_{name}"
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4)
    for name in ("share", "half_life", "state_norm", "condition"):
        last = [
            read_metrics(each / "metrics.jsonl")[-1].memory or {}
            for each in (whole, tmp_path / "run")
        ]
        np.testing.assert_allclose(last[1][name], last[0][name], rtol=1e-3)


def wait_for_step(output, process, step):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "checkpoints" / str(step)).is_dir():
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint {step} appeared")


def test_a_run_killed_while_fitting_and_stopped_while_training_resumes_where_it_was(
    finished, tmp_path, tiny_model_dir
):
    """And the same configuration and seed give, bit for bit, what they gave before."""
    whole, _ = finished
    output = tmp_path / "run"
    arguments = ["--config", whole / "config.yaml", "--output", output, "--sample-tokens", 0]
    for how, stage in ((signal.SIGKILL, "transfer"), (signal.SIGINT, ".")):
        process = subprocess.Popen(
            command("experiments.finetune", *arguments),
            cwd=PROJECT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        wait_for_step(output / stage, process, 2)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=120)
        assert (latest_step(output / stage) or 0) >= 2
    kept = latest_step(output) or 0
    assert process.returncode == 130 or kept == 8, "only after the last step it is too late to stop"
    assert b"Traceback" not in stderr
    done = run("experiments.finetune", *arguments)
    if kept < 8:
        assert f"resuming after {kept} of 8" in done.stdout
    assert all_losses(output) == all_losses(whole)
    resumed, undisturbed = weights(output, tiny_model_dir), weights(whole, tiny_model_dir)
    assert all(np.array_equal(resumed[name], undisturbed[name]) for name in resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "/nowhere/at/all"], "no such file or directory"),
        (["--data", "/nowhere/data.jsonl"], "/nowhere/data.jsonl"),
        (["--mesh", "data=3"], "devices"),
        (["--mesh", "data=1", "--mesh-rules", "head=tensor"], "one of embed, heads, kv_heads, mlp"),
        (["--mesh-rules", "experts=tensor"], "add --mesh"),
        (["--lora.targets", "q_prog"], "matches no projection"),
        (["--liza.operator", "delta_rul"], "operator"),
        (["--steps", "many"], "steps"),
        (["--no-such-flag"], "no-such-flag"),
        (["--fit-steps", "-1"], "fit: steps must be at least 0, got -1"),
        (["--fit-length", "8"], "fit: length must be above --liza.softmax-window 8"),
        (["--fit-data", "/nowhere/fit.txt"], "/nowhere/fit.txt"),
        (["--window-range", "4", "9"], "--window-range reaches 9, but --liza.softmax-window is 8"),
        (["--data.recall", "0.5", "--data.sequence-length", "30"], "raise --data.sequence-length"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_bad_input_is_one_line_and_status_2(changes, message, settings, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = [*map(str, settings), "--output", str(output), *changes]
    assert run_configured(finetune, FinetuneConfig, arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert len(stderr.strip().splitlines()) == 1
    assert message in stderr
    assert not output.exists()


def test_a_model_is_not_trained_into_its_own_directory(tiny_model_dir, capsys):
    before = sorted(tiny_model_dir.iterdir())
    arguments = ["--model", str(tiny_model_dir), "--output", str(tiny_model_dir)]
    assert run_configured(finetune, FinetuneConfig, arguments) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert sorted(tiny_model_dir.iterdir()) == before


def test_another_run_s_directory_is_not_overwritten(finished, settings, capsys):
    output, _ = finished
    arguments = [*map(str, settings), "--output", str(output), "--lora.rank", "3"]
    assert run_configured(finetune, FinetuneConfig, arguments) == 2
    assert "another --output" in capsys.readouterr().err
    assert latest_step(output) == 8


def test_generate_from_the_checkpoint(finished, capsys):
    def printed(*flags):
        arguments = ["--adapter", str(finished[0]), "--prompt", "The with statement", "--json"]
        arguments += ["--max-new-tokens", "24", *flags]
        assert run_configured(generate_text, GenerateConfig, arguments) == 0
        return capsys.readouterr().out

    stdout = printed("--compare")
    report = json.loads(stdout.splitlines()[-1])
    assert 1 <= report["new_tokens"] <= 24
    assert "The with statement" + report["text"] in stdout
    assert report["base"]["text"] != report["text"]
    assert json.loads(printed("--no-liza").splitlines()[-1])["text"] != report["text"]


def test_the_next_batch_is_made_while_the_device_works(tiny_model_dir, tmp_path, monkeypatch):
    events, counts = [], {}
    batch_at, make, wait = TokenBatchSource.batch_at, module.make_train_step, jax.block_until_ready

    def watched_batch_at(self, step, batch_size, seed, *part):
        batch = batch_at(self, step, batch_size, seed, *part)
        if part:  # evaluation and telemetry read all rows
            events.append(f"batch {step}")
            counts[step] = np.count_nonzero(batch.segment_ids)
        return batch

    def watched_make(*args, **kwargs):
        step = make(*args, **kwargs)
        return lambda *inputs: (events.append("step"), step(*inputs))[1]

    monkeypatch.setattr(TokenBatchSource, "batch_at", watched_batch_at)
    monkeypatch.setattr(module, "make_train_step", watched_make)
    monkeypatch.setattr(jax, "block_until_ready", lambda x: (events.append("wait"), wait(x))[1])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in range(1, 12)))
    data = DataConfig(path=str(rows), sequence_length=32, packing=False)
    config = {"model": str(tiny_model_dir), "output": tmp_path / "run", "data": data, "steps": 3}
    finetune(FinetuneConfig(**config, sample_tokens=0))
    waits = [place for place, event in enumerate(events) if event == "wait"]
    waits = [place for place in waits if place > events.index("step")]
    assert [events.count(f"batch {step}") for step in range(3)] == [1, 1, 1]
    # The first step is being compiled meanwhile.
    assert events.index("batch 1") < waits[0]
    assert events.index("batch 2") < waits[1]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    tokens = [record.tokens_per_s * record.seconds for record in records]
    np.testing.assert_allclose(tokens, [counts[step] for step in range(3)])
    assert len(set(counts.values())) > 1


@pytest.mark.slow
def test_the_demo_learns_on_real_weights(smollm_path, tmp_path):
    """SmolLM2 135M, its tokenizer and the Python language reference, for a few steps."""
    arguments = ["--steps", 1, "--output", tmp_path / "demo", "--sample-tokens", 0, "--json"]
    small = ["--fit-steps", 6, "--distill-steps", 2, "--fit-length", 256, "--fit-batch-size", 1]
    small += ["--data.sequence-length", 256, "--data.eval-tokens", 600, "--batch-size", 1]
    done = run("experiments.finetune", *arguments, *small, timeout=580)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["perplexity_before"] < 25
    assert report["perplexity_fitted"] < report["perplexity_window"]
    assert report["perplexity_after"] < report["perplexity_window"]
    assert report["recovered_gap_fitted"] > 0
