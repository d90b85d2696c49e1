"""The site has every page and public name, and its links are valid."""

import importlib
import json
import re

import pytest
import yaml

from tests.docs.pages import DOCS, PROJECT, pages

_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
_GENERATED = {"reference/command-line.md", "reference/changelog.md", "reference/contributing.md"}
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def _nav(entry):
    if isinstance(entry, str):
        return [entry]
    parts = entry if isinstance(entry, list) else entry.values()
    return [page for part in parts for page in _nav(part)]


@pytest.fixture(scope="module")
def nav():
    return set(_nav(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"]))


def test_every_page_is_in_the_navigation(nav):
    files = {p.relative_to(DOCS).as_posix() for s in ("md", "ipynb") for p in DOCS.rglob(f"*.{s}")}
    assert files | _GENERATED == nav


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", (PROJECT / page).read_text(), flags=re.M | re.S)
    for target in _LINK.findall(text):
        if not target.startswith(("http://", "https://", "#")):
            path = (PROJECT / page).parent / target.partition("#")[0]
            generated = path.resolve().relative_to(PROJECT).as_posix().removeprefix("docs/")
            assert path.exists() or generated in _GENERATED, f"{page}: {target}"


@pytest.mark.parametrize("package", ["tptt_jax", "tptt_jax.ops", "convert"])
def test_every_public_name_is_in_the_reference(package):
    texts = [path.read_text() for path in (DOCS / "reference").glob("*.md")]
    listed = set(re.findall(r"^::: ([\w.]+)$", "\n".join(texts), re.MULTILINE))
    names = importlib.import_module(package).__all__
    assert {f"{package}.{name}" for name in names if not name.startswith("__")} <= listed


def test_names_of_the_reference_exist():
    for path in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_command_line_page_has_every_command():
    # docs/hooks.py needs mkdocs, which is in the extra "docs" only.
    commands = re.search(r"^COMMANDS.*?^}", (DOCS / "hooks.py").read_text(), re.M | re.S)
    assert commands is not None
    from experiments.__main__ import COMMANDS

    modules = {module.removesuffix(".__main__") for module, _ in COMMANDS.values()}
    assert modules <= set(re.findall(r'^    "([\w.]+)":', commands[0], re.MULTILINE))
    from experiments.bench import COMMANDS as PARTS

    for part in (*PARTS, "import", "export", "push", "inspect", "verify"):
        assert f'"{part}"' in commands[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_files_that_pages_name_exist():
    named = re.compile(r"`((?:tptt_jax|convert|experiments|tests)/[\w/.]+)`")
    for page in pages():
        for path in named.findall((PROJECT / page).read_text()):
            # The tables of tests write paths below tests/.
            found = (PROJECT / path).exists() or (PROJECT / "tests" / path).exists()
            assert found, f"{page}: {path}"
