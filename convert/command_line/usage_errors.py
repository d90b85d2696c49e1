"""One sentence for arguments that do not parse, out of the box that tyro draws around an error."""

import contextlib
import difflib
import io
import re
from collections.abc import Callable, Sequence

_HELP = "--help lists the options."
# What int() and float() say, and what they expect.
_NUMBERS = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}
# What the options of other trainers are called here.
_SYNONYMS = {
    "--base-model": "--model",
    "--block-size": "--data.sequence-length",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--device-batch-size": "--batch-size",
    "--eval-steps": "--eval-every",
    "--gradient-checkpointing": "--remat",
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
    "--save-steps": "--checkpoint-every",
    "--seq-len": "--data.sequence-length",
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
    return set(re.findall(r"^[^\w-]*(--[a-z][\w.-]*)", text.getvalue(), re.MULTILINE))


def usage_sentence(box: str, options: Callable[[], set[str]]) -> str:
    """What is wrong with the arguments, and what was probably meant.

    Args:
      box: tyro's report.
      options: those of the command; called only where a name is looked for.
    """
    message, *sections = _sections(box) or [box.strip()]
    unknown = re.match(r"Unrecognized options: (.*)", message)
    if unknown is None:
        return f"{_shortened(message).rstrip('.')}; {_HELP}"
    words = unknown[1].split(", ")
    subcommands = [text for text in sections if text.startswith("Available subcommands: ")]
    if subcommands:
        names = subcommands[0].partition(": ")[2].split(", ")
        return f"there is no command {words[0]}: {_choose(words[0], names)}"
    name = next((word for word in words if word.startswith("-")), None)
    if name is None:
        return f"these arguments belong to no option: {' '.join(words)}; {_HELP}"
    name = name.partition("=")[0]
    meant = _meant(name, options())
    guess = f": did you mean {meant}?" if meant else ";"
    return f"there is no option {name}{guess} {_HELP}"


def _meant(name: str, options: set[str]) -> str | None:
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


def _shortened(message: str) -> str:
    for complaint, expected in _NUMBERS.items():
        pattern = rf"^Error parsing (\S+): {complaint}: (.*)"
        message = re.sub(pattern, rf"\1 expects {expected}, got \2", message)
    message = re.sub(r"^Error parsing [\w.]+: ", "", message)
    return re.sub(
        r"^Error parsing (\S+): no type matching (.*) could be instantiated from \[(.*)\]",
        r"\1 expects \2, got \3",
        message,
    )
