"""Ctrl-C while a command is importing."""

import os
import signal
import subprocess
import sys

import pytest

AS_SCRIPT = "import sys; sys.argv[0] = 'bin/tptt-jax'; "
CALL = "from experiments.__main__ import main; main()"
INTERRUPT = "import os, signal, experiments; os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "experiments.finetune", "--help"],
        ["-m", "convert", "inspect", "demo"],
        ["-c", AS_SCRIPT + CALL, "convert", "--help"],
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
    command = [sys.executable, "-c", AS_SCRIPT + INTERRUPT, "generate"]
    ended = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
