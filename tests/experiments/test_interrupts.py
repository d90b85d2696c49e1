"""Ctrl-C while a command is importing, and signals at the end of a stage."""

import ast
import io
import os
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments.process.interrupts import TerminationError
from experiments.training.event_files import EventFile
from experiments.training.metrics import StepRecord
from experiments.training.stage import Stage
from tptt_jax.training.checkpoint import latest_step
from tptt_jax.training.train_step import TrainState

SCRIPT = "import sys; from experiments.__main__ import main; sys.exit(main())"
# Ctrl-C at the moment when the script hands over to its command.
INTERRUPTED = "import os, signal; os.execv = lambda *_: signal.raise_signal(signal.SIGINT); "


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "experiments.finetune", "--help"],
        ["-m", "convert", "inspect", "demo"],
        ["-c", SCRIPT, "convert", "--help"],
    ],
    ids=["experiments", "convert", "tptt-jax"],
)
def test_ctrl_c_during_imports_is_one_line(arguments, project_dir):
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=project_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": str(project_dir)},
    ) as process:
        assert process.stderr is not None
        # A module after the project's own package, and long before the last one.
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == "numpy":
                break
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130
    assert rest == ["interrupted\n"]


def test_ctrl_c_before_the_script_starts_its_command(project_dir):
    command = [sys.executable, "-c", INTERRUPTED + SCRIPT, "generate"]
    ended = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_the_script_imports_nothing_before_it_can_handle_ctrl_c(project_dir):
    program = "import sys; old = {*sys.modules}; import experiments.__main__ as _; "
    program += "print({*sys.modules} - old)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=project_dir, capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout) == {"experiments", "experiments.__main__"}


class Metrics(NamedTuple):
    is_finite: bool = True


@pytest.mark.parametrize(
    ("number", "is_last", "expected"),
    [
        (signal.SIGINT, False, KeyboardInterrupt),
        (signal.SIGINT, True, None),
        (signal.SIGTERM, True, TerminationError),
    ],
    ids=["Ctrl-C", "Ctrl-C in the last stage", "SIGTERM"],
)
def test_a_signal_after_the_last_step_is_not_lost(number, is_last, expected, tmp_path, monkeypatch):
    close = EventFile.close

    def stop(self):
        os.kill(os.getpid(), number)
        close(self)

    monkeypatch.setattr(EventFile, "close", stop)
    stage = Stage(
        title="step",
        folder=tmp_path,
        steps=2,
        checkpoint_every=9,
        step=lambda state: (state._replace(step=state.step + 1), Metrics()),
        batch_at=lambda number: ((), 1),
        to_record=lambda done, *_: StepRecord(step=done, loss=1.0, tokens_per_s=1.0, seconds=1.0),
        is_last=is_last,
    )
    key, first = jax.random.key(0), jnp.int32(0)
    state = TrainState(trainable={"a": jnp.ones(2)}, opt_state={}, share=None, step=first, key=key)
    ended = None
    try:
        stage.run(state, Console(file=io.StringIO()))
    except KeyboardInterrupt as error:
        ended = type(error)
    assert ended is expected
    assert latest_step(tmp_path) == 2
