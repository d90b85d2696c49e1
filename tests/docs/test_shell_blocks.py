"""Commands on the pages have flags that the commands take."""

import importlib
import inspect
import re
import shlex
import sys
import types

import pytest
import tyro

from tests.docs.pages import PROJECT, blocks, pages

# Blocks without a language, or of a shell.
_SHELL = ("", "sh", "bash", "shell")


def _commands(page):
    for block in blocks(page):
        if block.language in _SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                # "..." stands for the arguments of the command before.
                words = [word for word in shlex.split(line, comments=True) if word != "..."]
                if words:
                    yield words


FOUND = [(page, words) for page in pages() for words in _commands(page)]
OURS = [
    pytest.param(words[2], words[3:], id=f"{page}-{' '.join(words[2:])[:60]}")
    for page, words in FOUND
    if words[:2] == ["python", "-m"] and re.fullmatch(r"convert|experiments\.\w+", words[2])
]


class _Parsed(BaseException):
    """Ends a command once its arguments are parsed; nothing in a command catches it."""


def _stop_after(parse):
    def parse_and_stop(first, *args, **kwargs):
        result = parse(first, *args, **kwargs)
        # A configured command is a function without parameters that parses its own arguments.
        is_wrapper = (
            isinstance(first, types.FunctionType) and not inspect.signature(first).parameters
        )
        if is_wrapper:
            return result
        raise _Parsed

    return parse_and_stop


@pytest.fixture
def parsed(monkeypatch):
    """Runs a command up to the end of parsing: None, or what it printed."""
    monkeypatch.setattr(tyro, "cli", _stop_after(tyro.cli))
    by_name = _stop_after(tyro.extras.subcommand_cli_from_dict)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", by_name)
    monkeypatch.chdir(PROJECT)

    def run(module, arguments):
        entry = importlib.import_module("convert.__main__" if module == "convert" else module)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            return f"status {entry.main()}"
        except _Parsed:
            return None
        except SystemExit as end:
            return f"status {end.code}"

    return run


@pytest.mark.parametrize(("module", "arguments"), OURS)
def test_the_real_parser_takes_it(module, arguments, parsed, capsys):
    result = parsed(module, arguments)
    assert result is None, (result, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("experiments.finetune", ["--model", "m", "--no-such-flag", "3"]),
        ("experiments.evaluate", ["--task", "no-such-task"]),
        ("experiments.bench", ["train", "--no-such-flag"]),
        ("convert", ["export", "a", "--format", "no-such-format"]),
    ],
)
def test_a_wrong_flag_is_seen(module, arguments, parsed):
    assert parsed(module, arguments) == "status 2"


def test_make_has_the_targets_that_pages_name():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {words[1] for _, words in FOUND if words[0] == "make"}
    assert {"finetune", "test", "docs"} <= targets
    assert named <= targets


def test_every_other_command_is_known():
    programs = {words[0] for _, words in FOUND} - {"make", "python"}
    assert programs <= {"pip", "tptt-jax"}
