"""Several processes that train together, on loopback."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.command_line import parse_arguments
from experiments.finetune import finetune, run_finetune
from experiments.process import distributed
from experiments.process.distributed import DistributedConfig, joined
from experiments.process.interrupts import TerminationError
from experiments.training import FinetuneConfig
from experiments.training.metrics import read_metrics
from tests.devices import device_environment, start_processes
from tptt_jax.processes import raised_together
from tptt_jax.training.checkpoint import latest_step

COORDINATOR = ["--distributed.coordinator", "127.0.0.1:8476"]
STEPS = 12
SECONDS = 600


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (COORDINATOR, "add --distributed.processes and --distributed.process, or give --distribu"),
        (["--distributed", "--distributed.process", "0"], "add --distributed.coordinator and "),
        (
            [*COORDINATOR, "--distributed.processes", "2", "--distributed.process", "2"],
            "must lie between 0 and 1, as there are 2 processes, got 2",
        ),
        (
            "--distributed.coordinator host --distributed.processes 2 --distributed.process 0",
            "must be HOST:PORT, such as 10.0.0.1:8476, got 'host'",
        ),
        (
            [*COORDINATOR, "--distributed.processes", "0", "--distributed.process", "0"],
            "--distributed.processes must be at least 1, got 0",
        ),
    ],
)
def test_a_wrong_combination_of_flags_is_one_line(flags, message, capsys):
    given = flags.split() if isinstance(flags, str) else flags
    assert run_finetune(finetune, ["--model", "smollm2-135m", *given]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_without_a_cluster_the_remedy_is_named(monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    config = parse_arguments(["--distributed"], FinetuneConfig).distributed
    assert config == DistributedConfig(enabled=True)
    with pytest.raises(ValueError, match=r"finds no cluster .*start it with srun"), joined(config):
        pass


@pytest.fixture
def group(monkeypatch):
    """Two processes by name only: where this one waits, and with which status it leaves."""
    waited, left = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_initialize", lambda *_: None)
    monkeypatch.setattr(distributed, "wait_for_all", waited.append)
    monkeypatch.setattr(distributed.atexit, "register", lambda _, status: left.append(status))
    return waited, left


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, 130),
        (TerminationError("stopped"), TerminationError, 0),
        (OSError("Connection reset by peer"), ConnectionError, 2),
        (RuntimeError("a bug"), RuntimeError, 1),
    ],
    ids=["Ctrl-C", "SIGTERM", "lost", "bug"],
)
def test_a_process_that_ends_alone_waits_for_no_other(error, raised, status, group):
    with pytest.raises(raised), joined(DistributedConfig(enabled=True)):
        raise error
    assert group == ([], [status])


@pytest.mark.parametrize(
    ("kind", "places"),
    [(KeyboardInterrupt, ["the end"]), (TerminationError, ["the end"]), (OSError, [])],
)
def test_processes_that_end_together_keep_their_error(kind, places, group):
    error = raised_together(kind("Connection reset by peer"))
    with pytest.raises(kind) as caught, joined(DistributedConfig(enabled=True)):
        raise error
    assert caught.value is error
    assert group == (places, [])


def test_another_process_prints_nothing_until_it_has_ended(group, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_first_process", lambda: False)
    with joined(DistributedConfig(enabled=True)):
        print("inside")
    print("after")
    assert capsys.readouterr().out == "after\n"


def losses(output: Path) -> list[float]:
    return [record.loss for record in read_metrics(output / "metrics.jsonl")]


def perplexities(output: Path) -> dict[str, list[float]]:
    found = json.loads((output / "evaluation.json").read_text())
    return {name: part["nats"] for name, part in found.items()}


@pytest.fixture
def command(tiny_model_dir, shared_programs):
    options = {
        "model": tiny_model_dir,
        "data.sequence-length": 32,
        "data.eval-tokens": 100,
        "steps": STEPS,
        "batch-size": 4,
        "checkpoint-every": 2,
        "sample-tokens": 0,
        "lora.rank": 2,
        "mesh": "fsdp=2",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    # A memory would take most of the time to compile.
    return ["-m", "experiments.finetune", "--no-liza", *flags]


@contextlib.contextmanager
def running(count, arguments):
    processes = start_processes(count, arguments)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with process:  # closes its pipes
                pass


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_two_processes_train_as_two_devices_do_also_when_one_is_killed(command, tmp_path):
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    subprocess.run(
        [sys.executable, *map(str, [*command, "--output", whole])],
        env=device_environment(2),
        timeout=SECONDS,
        capture_output=True,
        check=True,
    )
    with running(2, [*command, "--output", divided]) as (first, second):
        deadline = time.monotonic() + SECONDS
        while not latest_step(divided) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert latest_step(divided), first.communicate(timeout=SECONDS)
        second.kill()
        _, errors = first.communicate(timeout=SECONDS)
        assert first.returncode == 2
        assert "error: process 0 has lost another of the 2 processes: start all of" in errors
    assert 0 < len(losses(divided)) < STEPS
    with running(2, [*command, "--output", divided, "--json"]) as processes:
        results = [process.communicate(timeout=SECONDS) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], results
    printed = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in results]
    assert json.loads(printed[0][-1])["resumed_at"] > 0
    assert printed[1] == []
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-6)
    for name, nats in perplexities(whole).items():
        assert perplexities(divided)[name] == pytest.approx(nats, rel=1e-5, abs=1e-5)
