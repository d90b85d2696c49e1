"""Peak memory is that of the process itself, not of its parent."""

import subprocess
import sys

from experiments import evaluate, generate
from experiments.process import memory_use

HEIR = """
import os, sys
before = bytes(1_500_000_000)
code = (
    f"import sys; sys.path.insert(0, {sys.argv[1]!r}); "
    "from experiments.process.memory_use import host_peak_gb; print(host_peak_gb())"
)
os.execv(sys.executable, [sys.executable, "-c", code])
"""


def test_a_peak_is_not_inherited(project_dir):
    command = [sys.executable, "-c", HEIR, str(project_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert 0.02 < float(done.stdout) < 1.2
    assert generate.peak_gb is memory_use.peak_gb
    assert evaluate.peak_gb is memory_use.peak_gb
