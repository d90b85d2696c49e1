"""Prints the oldest release of each dependency that pyproject.toml permits, as pip's constraints.

    python tools/lower_bounds.py > oldest.txt
    PIP_CONSTRAINT=$PWD/oldest.txt make test

A bound is a claim, so CI runs the whole suite with them.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAME = r"[A-Za-z0-9._-]+"
_AT_LEAST = re.compile(rf"({_NAME})(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9A-Za-z.]*)")


def lower_bounds(pyproject: dict[str, Any]) -> Iterator[str]:
    """A line NAME==VERSION for each lower bound of the packages and their tests."""
    project = pyproject["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        if found := _AT_LEAST.match(requirement):
            yield f"{found[1]}=={found[2]}"


def main() -> int:
    """Prints the constraints of the project that this file belongs to."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(lower_bounds(tomllib.loads(text))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
