"""Annotated shapes and dtypes are those of the arrays."""

import subprocess
import sys


def test_every_call_takes_and_gives_what_its_annotations_say(project_dir):
    command = [sys.executable, "-m", "tests.annotated_calls"]
    done = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "inference" in done.stdout.splitlines()[-1]
