"""Output directories: refused before anything is computed, and for one process at a time."""

import os
import subprocess
import sys

import pytest

from experiments.process.output_folder import check_output_file, locked_output

HOLDER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from experiments.process.output_folder import locked_output
with locked_output(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_works_there(tmp_path, project_dir):
    output = tmp_path / "run [1]"
    command = [sys.executable, "-c", HOLDER, str(output), str(project_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        expected = f"in use by process {holder.pid} on "
        with pytest.raises(ValueError, match=expected), locked_output(output):
            pass
        holder.kill()
        holder.wait()
    # What a killed process leaves locks nobody out.
    with locked_output(output):
        (output / "kept").touch()
    assert [each.name for each in output.iterdir()] == ["kept"]


def test_what_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), locked_output(tmp_path / "a" / "b"):
        raise KeyError
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is a file: name a directory"),
        ("below a file", "lies below .*, which is a file"),
        ("dangling link", "is a link to .*, which is missing"),
        ("below a dangling link", "is a link to .*, which is missing"),
        ("long name", "cannot be written .File name too long"),
        ("long path", "choose a shorter path"),
        ("no place for files", "cannot be written"),
    ],
)
def test_an_impossible_output_is_refused(kind, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    paths = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "dangling link": tmp_path / "link",
        "below a dangling link": tmp_path / "link" / "x",
        "long name": tmp_path / ("x" * 300),
        "long path": tmp_path.joinpath(*["x" * 200] * 20),
        # Not even root may make directories there.
        "no place for files": type(tmp_path)("/proc/self/run"),
    }
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message), locked_output(paths[kind]):
        pass
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"), locked_output(tmp_path / "run"):
        pass


def test_an_impossible_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (".", "is a directory"),
        ("pipe", "is a pipe, a device or a socket"),
        ("link", "is a link to"),
        ("file/state", "not writable"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output_file(tmp_path / name, "--save-state")
    check_output_file(tmp_path / "new" / "state", "--save-state")
    check_output_file(tmp_path / "file", "--save-state")
