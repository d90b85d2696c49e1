"""Pages that `mkdocs build` makes: every command's --help, the changelog, how to contribute."""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]

# Module and subcommand of everything that has a --help.
COMMANDS: dict[str, Sequence[str]] = {
    "experiments.finetune": ("",),
    "experiments.generate": ("",),
    "experiments.evaluate": ("",),
    "convert": ("import", "export", "push", "inspect", "verify"),
    "experiments.bench": (
        *("op", "train", "decode", "attention", "context"),
        *("memory", "scaling", "saves", "kills"),
    ),
    "experiments.bench_gpu": ("",),
    "experiments.grid": ("",),
    "experiments.state_tracking": ("",),
}
_INTRODUCTION = """# Command line

Every command has two names: `python -m experiments.finetune` and `tptt-jax finetune` are the same
program. This page is the `--help` of each command, written when the site was built.

All commands share three rules:

- `--json` prints one JSON object as the last line of stdout, and `--debug` shows the traceback of
  an error.
- Bad input gives one line `error: ...` on stderr and exit status 2. A check that fails gives status
  1, an interruption 130.
- Options of `finetune` can come from a YAML file (`--config FILE`). Flags override the file.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {
        "reference/command-line.md": command_line_page(),
        "reference/changelog.md": root_page("CHANGELOG.md"),
        "reference/contributing.md": root_page("CONTRIBUTING.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


# What nbconvert adds to a notebook for formulas and diagrams, which ours have none of.
_NOTEBOOK_SCRIPTS = (
    re.compile(r'<script src=""> *</script>\s*<!-- MathJax.*?end of mathjax[^>]*-->', re.S | re.I),
    re.compile(r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', re.S),
)
# Whatever a browser would fetch from elsewhere.
_FOREIGN = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?https?:[^>]*>"
    r"|import\(\"https?:[^)]*\)|@import[^;]*https?:[^;]*;|url\([\"']?https?:[^)]*\)"
)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Removes scripts of other sites, and stops the build if any is left.

    Raises:
      PluginError: if the page fetches something.
    """
    for script in _NOTEBOOK_SCRIPTS:
        output = script.sub("", output)
    if found := _FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from the network: {found[0]:.200}")
    return output


def root_page(name: str) -> str:
    """A Markdown file of the project's root, with links that hold on the site."""
    text = (PROJECT / name).read_text(encoding="utf-8")
    text = text.replace("](docs/", "](../")
    return text.replace("](CHANGELOG.md)", "](changelog.md)")


def command_line_page() -> str:
    """The --help of all commands."""
    parts = [_INTRODUCTION]
    for module, subcommands in COMMANDS.items():
        for subcommand in subcommands:
            name = f"python -m {module} {subcommand}".strip()
            parts.append(f"## `{name}`\n\n```text\n{command_help(module, subcommand)}\n```\n")
    return "\n".join(parts)


def command_help(module: str, subcommand: str = "") -> str:
    """What `python -m MODULE [SUBCOMMAND] --help` prints."""
    entry = importlib.import_module("convert.__main__" if module == "convert" else module)
    arguments = [module, *filter(None, [subcommand]), "--help"]
    stdout = io.StringIO()
    environment = {"COLUMNS": "100", "NO_COLOR": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(stdout),
        contextlib.suppress(SystemExit),
    ):
        entry.main()
    text = re.sub(r"\x1b\[[0-9;]*m", "", stdout.getvalue())
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
