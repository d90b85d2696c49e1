"""One sentence for arguments that do not parse, out of the box that tyro draws around an error."""

import ast
import contextlib
import difflib
import io
import re
from collections.abc import Callable, Sequence

_HELP = "--help lists the options."
_NAME = r"--[a-z][\w.-]*"
# tyro's names of types.
_TYPES = {"INT": "a whole number", "FLOAT": "a number"}
# Messages of int() and float(), and what they expect.
_NUMBERS = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}
# Our names for the options of other trainers.
_SYNONYMS = {
    "--base-model": "--model",
    "--bf16": "--dtype",
    "--block-size": "--data.sequence-length",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--device-batch-size": "--batch-size",
    "--eval-steps": "--eval-every",
    "--fp16": "--dtype",
    "--gradient-checkpointing": "--remat",
    "--hub-model-id": "--push-to-hub",
    "--hub-private-repo": "--hub-private",
    "--input": "--data",
    "--learning-rate-schedule": "--lr-schedule",
    "--lora-alpha": "--lora.alpha",
    "--lora-dropout": "--lora.dropout",
    "--lora-r": "--lora.rank",
    "--lora-target-modules": "--lora.targets",
    "--lr": "--learning-rate",
    "--lr-scheduler-type": "--lr-schedule",
    "--max-grad-norm": "--grad-clip",
    "--max-length": "--data.sequence-length",
    "--max-seq-len": "--data.sequence-length",
    "--max-seq-length": "--data.sequence-length",
    "--max-steps": "--steps",
    "--max-tokens": "--max-new-tokens",
    "--model-name-or-path": "--model",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--out": "--output",
    "--output-dir": "--output",
    "--per-device-train-batch-size": "--batch-size",
    "--r": "--lora.rank",
    "--rank": "--lora.rank",
    "--save-every": "--checkpoint-every",
    "--save-steps": "--checkpoint-every",
    "--seq-len": "--data.sequence-length",
    "--seq-length": "--data.sequence-length",
    "--save-total-limit": "--keep-last",
    "--sequence-length": "--data.sequence-length",
    "--target-modules": "--lora.targets",
    "--tasks": "--task",
    "--warmup": "--warmup-steps",
    "--weight-decay-rate": "--weight-decay",
    "--window-size": "--liza.softmax-window",
}


def list_options(print_help: Callable[[], object]) -> set[str]:
    """The options that a help text has.

    Args:
      print_help: prints it, and may exit.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        print_help()
    # An option and its opposite share a line: --resume, --no-resume.
    lines = re.findall(rf"^[^\w-]*({_NAME}(?:, {_NAME})*)", text.getvalue(), re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def usage_sentence(box: str, options: Callable[[], set[str]], arguments: Sequence[str] = ()) -> str:
    """What is wrong with the arguments, and what was probably meant.

    Args:
      box: tyro's report.
      options: those of the command; called only where a name is looked for.
      arguments: of the command; tyro reports a missing argument before an unknown option.
    """
    message, *sections = _sections(box) or [box.strip()]
    unknown = re.match(r"Unrecognized options: (.*)", message)
    words = unknown[1].split(", ") if unknown else []
    if message.startswith("Missing "):
        known = options()
        given = [word for word in arguments if re.match(_NAME, word)]
        words = [word for word in given if word.partition("=")[0].replace("_", "-") not in known]
    if not words:
        sentence = _shortened(message, sections).rstrip(".")
        return f"{sentence}{'' if sentence.endswith('?') else ';'} {_HELP}"
    subcommands = [text for text in sections if text.startswith("Available subcommands: ")]
    if subcommands:
        names = subcommands[0].partition(": ")[2].split(", ")
        return f"there is no command {words[0]}: {_choose(words[0], names)}"
    name = next((word for word in words if word.startswith("-")), None)
    if name is None:
        return f"no option takes these arguments: {' '.join(words)}; {_HELP}"
    name = name.partition("=")[0]
    meant = _closest_option(name, options())
    guess = f": did you mean {meant}?" if meant else ";"
    return f"there is no option {name}{guess} {_HELP}"


def _closest_option(name: str, options: set[str]) -> str | None:
    synonym = _SYNONYMS.get(name.replace("_", "-"))
    if synonym in options:
        return synonym
    # Without the dashes, which would make all names alike.
    bare = {option.strip("-"): option for option in sorted(options)}
    close = difflib.get_close_matches(name.strip("-"), bare, n=1)
    return bare[close[0]] if close else None


def _choose(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}."


def _sections(box: str) -> list[str]:
    """The texts between the rules of the box, without its title."""
    parts: list[list[str]] = [[]]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    for line in plain.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        if set(text) <= {"─", "-"}:
            parts.append([])
        else:
            parts[-1].append(text)
    texts = [" ".join(part).strip() for part in parts]
    return [text for text in texts if text]


def _shortened(message: str, sections: Sequence[str]) -> str:
    """Rewrites a complaint of tyro in the words of our own errors."""
    for rewrite in (_choice, _number, _missing):
        if sentence := rewrite(message, sections):
            return sentence
    return re.sub(r"^Error parsing \w[\w.-]*: ", "", message)


def _choice(message: str, sections: Sequence[str]) -> str | None:
    found = re.match(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of (\(.*\))", message
    )
    if found is None:
        commands = re.match(r"Expected one of \{(.*)\}", message)
        return f"name a command: {commands[1]}" if commands else None
    value, option, listed = found.groups()
    choices: list[str] = list(ast.literal_eval(listed))
    if "None" in choices:  # tyro lists those of an optional choice in no order
        choices.sort()
    close = difflib.get_close_matches(value, choices, n=1)
    guess = f": did you mean {close[0]}?" if close else ""
    return f"{option} expects one of {', '.join(choices)}, got {value!r}{guess}"


def _number(message: str, sections: Sequence[str]) -> str | None:
    """A value that is not of its option's type."""
    found = re.match(r"Error parsing (-\S+): (.*)", message)
    if found is None:
        return None
    option, complaint = found.groups()
    for text, expected in _NUMBERS.items():
        if value := re.match(rf"{text}: (.*)", complaint):
            return f"{option} expects {expected}, got {value[1]}"
    if value := re.match(r"no type matching (.*) could be instantiated from \[(.*)\]", complaint):
        expected = value[1].removeprefix("{None}|").strip("{}")
        if re.fullmatch("INT( INT)+", expected):
            expected = f"{len(expected.split())} whole numbers"
        return f"{option} expects {_TYPES.get(expected, expected)}, got {value[2]}"
    if value := re.match(r"Could not find valid parse for arguments: \[(.*)\]", complaint):
        help_text = next((text for text in sections if text.startswith("Argument helptext:")), "")
        kind = re.search(rf"{re.escape(option)} \[?(\w+)", help_text)
        several = {"INT": "whole numbers", "FLOAT": "numbers"}
        expected = several.get(kind[1], kind[1]) if kind else "another value"
        return f"{option} expects {expected}, got {value[1]}"
    return None


def _missing(message: str, sections: Sequence[str]) -> str | None:
    """An argument or a value that was not given."""
    if found := re.match(r"Missing value for argument '(\S+)'\. Expected (.*) values?", message):
        option, count = found.groups()
        if not option.startswith("-"):
            return f"the argument {option} is missing"
        return f"{option} needs {'a value' if count == '1' else f'{count} values'}"
    if found := re.match(r"Missing from (.*?): (.*)", message):
        command, listed = found.groups()
        parts = re.findall(r"((?:--\S+ )?\S+) (.*?)\.? \(required\)", listed)
        return f"{command} needs {' and '.join(f'{name} ({text})' for name, text in parts)}"
    return None
