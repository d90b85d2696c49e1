"""A mistake in the arguments is answered with the name that was meant."""

import errno
from pathlib import Path

import pytest

from convert.__main__ import export_model, import_model
from convert.command_line import run_command
from experiments.bench import COMMANDS
from experiments.command_line import parse_arguments
from experiments.training import FinetuneConfig


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--lora-rank", "--lora.rank"),
        ("--lora_r", "--lora.rank"),
        ("--max-steps", "--steps"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--output-dir=x", "--output"),
        ("--learning_rat", "--learning-rate"),
        ("--liza.window", "--liza.softmax-window"),
    ],
)
def test_finetune_names_the_option_that_was_meant(flag, meant):
    with pytest.raises(ValueError, match="there is no option --") as caught:
        parse_arguments([flag, "3"], FinetuneConfig)
    name = flag.partition("=")[0]
    words = f"there is no option {name}: did you mean {meant}? --help lists the options."
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command trian: did you mean train?"),
        (
            ["x"],
            "there is no command x: choose from op, train, decode, attention, context, memory, "
            "scaling, saves, kills.",
        ),
        # What other programs call so is no option here.
        (["op", "--lr", "1"], "there is no option --lr; --help lists the options."),
        (["op", "--head", "1"], "there is no option --head: did you mean --heads?"),
        (
            ["op", "--heads", "x"],
            "--heads expects a whole number, got 'x'; --help lists the options.",
        ),
        (["op", "--precision", "x"], "--precision expects one of auto, "),
        (
            ["op", "--precision", "higest"],
            "--precision expects one of auto, highest, high, default, got 'higest': "
            "did you mean highest? --help lists the options.",
        ),
        (
            [],
            "name a command: op, train, decode, attention, context, memory, scaling, saves, kills; "
            "--help",
        ),
        (["op", "--heads"], "--heads needs a value; --help"),
    ],
    ids=[
        "command",
        "no such command",
        "no such option",
        "option",
        "type",
        "choice",
        "close choice",
        "no command",
        "no value",
    ],
)
def test_one_line_for_commands_of_functions(arguments, message, capsys):
    assert run_command(COMMANDS, arguments, prog="bench") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # tyro would say what is missing, and not what is wrong.
        (["--formt", "peft"], "there is no option --formt: did you mean --format? --help"),
        (["x"], "python -m convert export needs --output PATH (the directory to write); --help"),
        (["x", "--no-overwrite"], "python -m convert export needs --output PATH"),
        ([], "python -m convert export needs STR ("),
    ],
    ids=["unknown option", "required option", "known option", "required argument"],
)
def test_missing_arguments(arguments, message, capsys):
    commands = {"export": export_model, "import": import_model}
    assert run_command(commands, ["export", *arguments], prog="python -m convert") == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_missing_file_has_no_error_number(tmp_path, capsys):
    def read(path: str) -> None:
        Path(path).read_text()

    assert run_command(read, ["--path", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"error: no such file: {tmp_path / 'x'}\n"
    assert run_command(read, ["--path", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("name", [None, "x"])
def test_a_full_disk_has_a_remedy(name, capsys):
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    assert run_command(write, []) == 2
    place = f"{name}: " if name else ""
    expected = f"error: {place}No space left on device: make room, and give the same command again."
    assert capsys.readouterr().err == f"{expected}\n"
