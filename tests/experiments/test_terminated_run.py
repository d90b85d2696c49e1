"""A run in this process that SIGTERM stops and its configuration resumes, and what it leaves."""

import contextlib
import io
import json
import os
import re
import shlex
import signal

import pytest

from experiments.command_line import run_configured
from experiments.finetune import finetune
from experiments.training import FinetuneConfig
from experiments.training.event_files import read_frames
from experiments.training.metrics import read_metrics
from experiments.training.report import TrainingProgress
from tests.experiments.shared_steps import share_steps
from tptt_jax.training.checkpoint import latest_step


class Own:
    """A user's tracker."""

    def __init__(self):
        self.losses, self.ended = {}, 0

    def log(self, step, metrics):
        assert step not in self.losses
        self.losses[step] = metrics["train/loss"]

    def close(self):
        self.ended += 1


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    """Output, what both calls printed, and the tracker of both."""
    output = tmp_path_factory.mktemp("runs") / "my run"
    arguments = ["--model", tiny_model_dir, "--data", "python-docs", "--output", output]
    arguments += ["--data.sequence-length", 32, "--data.eval-tokens", 100, "--steps", 5]
    arguments += ["--fit-steps", 0, "--liza.softmax-window", 8, "--checkpoint-every", 3]
    arguments += ["--batch-size", 1, "--sample-tokens", 2, "--sample-prompt", "a <b> $c"]
    own, printed = Own(), []
    update = TrainingProgress.update

    def terminate(self, record):
        update(self, record)
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def call(arguments):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            status = run_configured(
                lambda config: finetune(config, [own]), FinetuneConfig, [*map(str, arguments)]
            )
        printed.append(shown.getvalue())
        assert status == 0

    with share_steps():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingProgress, "update", terminate)
            call([*arguments, "--json"])
        assert latest_step(output) == 2, "the step at hand ends, and is saved"
        *_, command = [line for line in printed[0].splitlines() if "python -m" in line]
        call(shlex.split(command)[3:])
    return output, printed, own


def test_sigterm_says_how_to_go_on(run):
    output, printed, _ = run
    assert "stopped after step 2 of 5, which is saved; nothing is lost" in printed[0]
    report = json.loads(printed[0].splitlines()[-1])
    assert report["terminated"].startswith("stopped after step 2 of 5")
    assert "resuming after 2 of 5" in printed[1]
    assert latest_step(output) == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_trackers_and_tensorboard_have_every_step_once(run):
    output, _, own = run
    losses = {record.step: record.loss for record in read_metrics(output / "metrics.jsonl")}
    assert own.losses == losses
    assert list(losses) == [1, 2, 3, 4, 5]
    assert own.ended == 2
    frames = [f for file in output.glob("events.*") for f in read_frames(file.read_bytes())]
    assert sum(b"tokens_per_s" in frame for frame in frames) == 5


def test_the_memory_of_each_layer_is_measured_at_checkpoints_and_the_end(run):
    output, _, _ = run
    found = {r.step: r.memory for r in read_metrics(output / "metrics.jsonl") if r.memory}
    assert list(found) == [3, 5]
    assert found[5]["layer"] == [0, 1, 2]
    assert all(0 < share < 1 for share in found[5]["share"])
    assert all(norm > 0 for norm in found[5]["state_norm"])


def test_the_report_shows_the_run_and_needs_no_network(run):
    output, printed, _ = run
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2, "training, and perplexity by position"
    for text in (
        *("before training", "after training", "a &lt;b&gt; $c", "base model, full softmax"),
        *("share of the memory", "softmax_window: 8", "learning_rate: 0.001", "jax 0."),
        *("experiments.generate --adapter", "experiments.evaluate --models", "convert export"),
    ):
        assert text in page, text
    assert not re.findall(r"(?:src|href)=(?!\"data:)|@import|url\(", page)
    assert "report.html, metrics and checkpoints are in" in printed[1]
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    command = ["--config", str(output / "config.yaml")]
    assert run_configured(finetune, FinetuneConfig, command) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
