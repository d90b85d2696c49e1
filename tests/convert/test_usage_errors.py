"""A mistake in the arguments is answered with the name that was meant."""

import pytest

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
        (["x"], "there is no command x: choose from op, train, decode, attention, context."),
        # What other programs call so is no option here.
        (["op", "--lr", "1"], "there is no option --lr; --help lists the options."),
        (["op", "--head", "1"], "there is no option --head: did you mean --heads?"),
        (
            ["op", "--heads", "x"],
            "--heads expects a whole number, got 'x'; --help lists the options.",
        ),
        (["op", "--precision", "x"], "invalid choice 'x' for argument '--precision'."),
    ],
    ids=["command", "no such command", "no such option", "option", "type", "choice"],
)
def test_one_line_for_commands_of_functions(arguments, message, capsys):
    assert run_command(COMMANDS, arguments, prog="bench") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
