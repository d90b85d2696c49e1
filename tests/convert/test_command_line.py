import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import load_pretrained
from convert.__main__ import main
from convert.command_line import run_command
from convert.formats import SafetensorsDirectory
from tests.convert.checkpoints import GEMMA, LLAMA, hf_shapes, random_tensors, write_directory
from tptt_jax import LizaConfig, init_cache


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


@dataclasses.dataclass
class Options:
    """Options."""

    first: int = 1
    """A sentence that breaks
    "before" marks,
    (before) brackets
    and words."""


def reports(options: Options, second: int = 2) -> None:
    """Reports.

    Args:
      options: more.
      second: another sentence with
        "marks" and
        words.
    """


def test_help_texts_break_where_the_terminal_ends(capsys, monkeypatch):
    """tyro alone keeps the line breaks of docstrings."""
    monkeypatch.setenv("COLUMNS", "100")
    for _ in range(2):
        assert run_command(reports, ["--help"]) == 0
        text = capsys.readouterr().out
        assert 'A sentence that breaks "before" marks, (before) brackets and words.' in text
        assert 'another sentence with "marks" and words. (default: 2)' in text


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
    [("value", "error: a bad value\n"), ("os", "error: no such file: x\n")],
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
        f"error: {output} exists and is not empty; choose another directory, or allow "
        "--overwrite.\n"
    )
    assert run_main(monkeypatch, capsys, *arguments, "--overwrite")[0] == 0


def test_unknown_source(monkeypatch, capsys):
    status, captured = run_main(monkeypatch, capsys, "inspect", "./nowhere")
    assert status == 2
    assert captured.err.startswith("error: no such file or directory: ./nowhere")


@pytest.mark.parametrize(
    ("stored", "name", "expected"),
    [
        (np.float64, "F64", "F32"),
        (np.float32, "F32", "F32"),
        (np.float16, "F16", "F16"),
        (ml_dtypes.bfloat16, "BF16", "BF16"),
    ],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_import_keeps_the_dtype_and_every_bit(
    tmp_path, monkeypatch, capsys, stored, name, expected
):
    tensors = random_tensors(hf_shapes(LLAMA), stored)
    path, output = write_directory(tmp_path / "m", LLAMA, tensors), tmp_path / "out"
    assert {info.dtype for info in SafetensorsDirectory(path).tensors.values()} == {name}
    assert run_main(monkeypatch, capsys, "import", path, "--output", output)[0] == 0
    written = SafetensorsDirectory(output)
    assert {info.dtype for info in written.tensors.values()} == {expected}
    for key, value in tensors.items():
        got = written.read(key)
        np.testing.assert_array_equal(got.view(np.uint8), value.astype(got.dtype).view(np.uint8))


def test_auto_is_what_most_numbers_are_stored_in(tmp_path):
    tensors = random_tensors(hf_shapes(LLAMA), ml_dtypes.bfloat16)
    tensors |= {key: x.astype(np.float32) for key, x in tensors.items() if x.ndim == 1}
    path = write_directory(tmp_path / "m", LLAMA, tensors)
    assert load_pretrained(path, dtype="auto").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        (np.float64, 1e39, "float32"),
        (np.float32, 1e5, "float16"),
        (np.float32, np.finfo(np.float32).max, "bfloat16"),
        (np.float16, np.inf, "bfloat16"),
        (ml_dtypes.bfloat16, np.nan, "auto"),
        (np.float64, np.nan, "auto"),
    ],
)
def test_what_is_not_finite_is_named(tmp_path, monkeypatch, capsys, stored, value, dtype):
    tensors = random_tensors(hf_shapes(LLAMA), stored)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    path = write_directory(tmp_path / "m", LLAMA, tensors)
    arguments = ("import", path, "--output", tmp_path / "out", "--dtype", dtype)
    status, captured = run_main(monkeypatch, capsys, *arguments)
    assert status == 2
    assert captured.err.endswith(
        "in model.layers.1.mlp.up_proj.weight: fetch or train them again, or choose float32.\n"
    )
    assert not (tmp_path / "out").exists()


def test_inspect_counts_what_a_cache_takes(tmp_path, monkeypatch, capsys):
    path = write_directory(tmp_path / "m", GEMMA)
    arguments = ("inspect", path, "--context", 3, 40, "--window", 6, "--json")
    status, output = run_main(monkeypatch, capsys, *arguments)
    found = json.loads(output.out.splitlines()[-1])
    assert status == 0
    variants = {
        "base": None,
        "Titan, window 6": LizaConfig(softmax_window=6),
    }
    for row in found["state"]:
        model = load_pretrained(path, variants[row["model"]])
        real = init_cache(model, 1, row["tokens"])
        assert row["bytes"] == sum(
            leaf.nbytes for leaf in jax.tree.leaves((real.stacks, real.length))
        )
    assert len(found["state"]) == 4
    # 2 KV heads of width 8 in float32: keys and values; a state of 8 x 8. Layers that the base
    # model windows itself have no memory.
    slot, memory = 2 * 2 * 8 * 4, 2 * 8 * 8 * 4
    assert [tuple(row.values()) for row in found["layer_state"]] == [
        ("base", "full", slot, None, 0, 1),
        ("base", "sliding", slot, 5 * slot, 0, 6),
        ("Titan, window 6", "full", slot, (6 + 4) * slot, memory, 1),
        ("Titan, window 6", "sliding", slot, 5 * slot, 0, 6),
    ]


def test_inspect_is_readable(tmp_path, monkeypatch, capsys):
    path = write_directory(tmp_path / "m", GEMMA)
    status, output = run_main(monkeypatch, capsys, "inspect", path, "--context", 1_048_576)
    assert status == 0
    assert "dtypes: F32 93\n" in output.out
    # One full layer, six that hold five tokens, and the length of the row.
    nbytes = 128 * 1_048_576 + 6 * 5 * 128 + 4
    assert f"  base               1048576  {nbytes / 1e6:.1f} MB\n" in output.out


def test_bad_context(tmp_path, monkeypatch, capsys):
    path = write_directory(tmp_path / "m", LLAMA)
    status, output = run_main(monkeypatch, capsys, "inspect", path, "--context", 0)
    assert status == 2
    assert "at least 1 token" in output.err
