import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from convert.__main__ import main
from convert.command_line import run_command
from convert.hf_directory import SafetensorsDirectory
from tests.convert.checkpoints import LLAMA, hf_shapes, write_directory


def command(count: int, name: Literal["a", "b"] = "a", fail: str = "") -> dict[str, object]:
    """Counts.

    Args:
      count: how far.
      name: which one.
      fail: how to fail.
    """
    print("working")
    if fail:
        raise {
            "value": ValueError("a bad\n  value"),
            "os": FileNotFoundError(2, "No such file", "x"),
            "interrupt": KeyboardInterrupt(),
            "bug": RuntimeError("a bug"),
            "exit": SystemExit(5),
        }[fail]
    losses = [np.float32(1.5), math.inf]
    return {"count": count, "name": name, "loss": math.nan, "list": losses, "path": Path("x")}


def test_json_is_the_last_line(capsys):
    assert run_command(command, ["--json", "--count", "3", "--name", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "working"
    assert json.loads(lines[-1]) == {
        **{"count": 3, "name": "b", "loss": None, "list": [1.5, None], "path": "x"}
    }


def test_readable_without_json(capsys):
    assert run_command(command, ["--count", "3"]) == 0
    assert "count: 3\nname: a\n" in capsys.readouterr().out


def test_help_names_defaults_and_common_flags(capsys):
    assert run_command(command, ["--help"]) == 0
    text = capsys.readouterr().out
    for part in ("Counts.", "how far", "(default: a)", "--json", "--debug"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--count"),
        (["--count", "three"], "three"),
        (["--count", "3", "--nmae", "b"], "--nmae"),
        (["--count", "3", "--name", "c"], "c"),
    ],
)
def test_arguments_that_do_not_parse(capsys, arguments, message):
    assert run_command(command, arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert "working" not in captured.out


@pytest.mark.parametrize(
    ("fail", "line"),
    [("value", "error: a bad value\n"), ("os", "error: [Errno 2] No such file: 'x'\n")],
)
def test_bad_input_is_one_line(capsys, fail, line):
    assert run_command(command, ["--count", "1", "--fail", fail]) == 2
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(capsys):
    assert run_command(command, ["--count", "1", "--fail", "value", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: a bad value\n")


def test_interrupt_and_exit():
    assert run_command(command, ["--count", "1", "--fail", "interrupt"]) == 130
    assert run_command(command, ["--count", "1", "--fail", "exit"]) == 5


def test_bugs_are_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(command, ["--count", "1", "--fail", "bug"])


def test_flags_after_a_bare_dash_dash_belong_to_the_command(capsys):
    assert run_command(command, ["--count", "1", "--", "--json"]) == 2
    assert "--json" in capsys.readouterr().err


def test_subcommands(capsys):
    assert run_command({"go": command, "stay": command}, ["go", "--count", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"] == 2
    assert run_command({"go": command, "stay": command}, ["run"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    status = main()
    return status, capsys.readouterr()


def test_inspect(tmp_path, monkeypatch, capsys):
    path = write_directory(tmp_path / "m", LLAMA)
    status, output = run_main(monkeypatch, capsys, "inspect", path, "--json")
    found = json.loads(output.out.splitlines()[-1])
    assert status == 0
    assert found["family"] == "llama"
    assert found["parameters"] == sum(math.prod(shape) for shape in hf_shapes(LLAMA).values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == {"F32": len(hf_shapes(LLAMA))}


def test_import(tmp_path, monkeypatch, capsys):
    path, output = write_directory(tmp_path / "m", LLAMA), tmp_path / "out"
    arguments = ("import", path, "--output", output, "--dtype", "bfloat16")
    assert run_main(monkeypatch, capsys, *arguments)[0] == 0
    assert {info.dtype for info in SafetensorsDirectory(output).tensors.values()} == {"BF16"}
    status, captured = run_main(monkeypatch, capsys, *arguments)
    assert status == 2
    assert captured.err == (
        f"error: {output} exists and is not empty; choose another directory or ask to overwrite "
        "it.\n"
    )
    assert run_main(monkeypatch, capsys, *arguments, "--overwrite")[0] == 0


def test_unknown_source(monkeypatch, capsys):
    status, captured = run_main(monkeypatch, capsys, "inspect", "./nowhere")
    assert status == 2
    assert captured.err.startswith("error: ./nowhere does not exist")
