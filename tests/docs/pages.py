"""Code blocks of the documentation, and which pages there are."""

import re
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line where the text begins."""

    language: str
    text: str
    line: int


def pages() -> list[str]:
    """Every Markdown page, by its path from the project's folder."""
    below = sorted(path.relative_to(PROJECT).as_posix() for path in DOCS.rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *below]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    return [
        Block(match[1].strip(), match[2], text.count("\n", 0, match.start(2)) + 1)
        for match in _FENCE.finditer(text)
    ]
