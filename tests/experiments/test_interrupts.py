"""Ctrl-C while a command is importing."""

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["finetune", "evaluate"])
def test_ctrl_c_during_imports_is_one_line(module, project_dir):
    command = [sys.executable, "-X", "importtime", "-m", f"experiments.{module}", "--help"]
    with subprocess.Popen(
        command, cwd=project_dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
