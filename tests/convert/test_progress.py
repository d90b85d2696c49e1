import io
import os
import pty
import subprocess
import sys

import pytest

from convert.progress import progress_bars, track
from tests.convert.checkpoints import LLAMA, write_directory


def test_track_yields_the_items_whether_shown_or_not(capsys):
    assert list(track([1, 2, 3], "Counting", [1, 0, 5])) == [1, 2, 3]
    with progress_bars(enabled=True):
        assert list(track([1, 2, 3], "Counting")) == [1, 2, 3]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def run_on_a_terminal(*arguments):
    """What a command writes to stdout, and to its terminal's stderr."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "convert", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(child)
    seen = io.BytesIO()
    # Linux reports the end of a terminal as an error.
    try:
        while piece := os.read(parent, 4096):
            seen.write(piece)
    except OSError:
        pass
    out, _ = process.communicate(timeout=120)
    os.close(parent)
    return process.returncode, out.decode(), seen.getvalue().decode()


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["readable", "json"])
def test_bars_are_on_the_terminal_only(tmp_path, flags):
    path = write_directory(tmp_path / "m", LLAMA)
    arguments = ("import", path, "--output", tmp_path / "out", *flags)
    status, out, err = run_on_a_terminal(*arguments)
    assert status == 0
    assert "weights" not in out
    assert (("Reading weights" in err) and ("Writing weights" in err)) == (not flags)
    others = [line for line in err.splitlines() if not line.startswith("no tokenizer was written")]
    assert bool(others) == (not flags)
