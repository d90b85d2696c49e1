"""Every environment variable of the code is on its page."""

import ast
import re

import pytest

from tests.docs.pages import DOCS, PROJECT

PAGE = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
FILES = [
    path
    for package in ("tptt_jax", "convert", "experiments")
    for path in sorted((PROJECT / package).rglob("*.py"))
]
# Names in texts and dictionaries that no `environ` stands beside.
_PREFIXED = re.compile(
    r"\b(?:TPTT_JAX|JAX|XLA|XDG|HF|GLIBC|TRANSFORMERS|TOKENIZERS|CUDA|OMP|MKL|LIBTPU|TF)_[A-Z][A-Z_]+"
)
_READERS = ("get", "setdefault", "pop", "getenv", "putenv", "unsetenv")


def _is_environment(node):
    return ast.unparse(node).endswith("environ")


def _keys(tree):
    """The expressions that name a variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_environment(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and any(map(_is_environment, node.comparators)):
            yield node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr in _READERS and (_is_environment(owner) or _is_os(owner)):
                yield node.args[0]


def _is_os(node):
    return isinstance(node, ast.Name) and node.id == "os"


def variables(source):
    keys = list(_keys(ast.parse(source)))
    named = [key.value for key in keys if isinstance(key, ast.Constant)]
    unnamed = [ast.unparse(key) for key in keys if not isinstance(key, ast.Constant)]
    assert not unnamed, f"write the variable's name where it is read, not {unnamed}"
    return {*named, *_PREFIXED.findall(source)}


def test_the_page_has_every_variable_of_the_code():
    found = {}
    for path in FILES:
        for name in variables(path.read_text(encoding="utf-8")):
            found.setdefault(name, path.relative_to(PROJECT).as_posix())
    missing = {name: file for name, file in found.items() if f"`{name}`" not in PAGE}
    assert not missing
    ours = PAGE.partition("## Useful ones")[0]
    listed = set(re.findall(r"^\| `([A-Z_]+)`", ours, re.MULTILINE))
    assert listed <= set(found), "the page names variables that the code does not have"
    assert len(found) >= 6


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['NEW_ONE']",
        "import os\nos.environ.get('NEW_ONE')",
        "import os\nif 'NEW_ONE' in os.environ: pass",
        "import os\nos.getenv('NEW_ONE')",
        "from os import environ\nenviron.setdefault('NEW_ONE', '1')",
        "extra = {'XLA_NEW_ONE': '1'}",
    ],
)
def test_each_way_to_read_one_is_seen(source):
    assert variables(source) & {"NEW_ONE", "XLA_NEW_ONE"}
