"""Prints how the packages are built: functions, arguments, files, docstrings, folders.

    python tools/structure.py [ROOT]

The syntax tree is read, nothing is imported. The PyTorch file that exports carry
(convert/titan/modeling_titan.py) has to be one file and does not count.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("tptt_jax", "convert", "experiments")
LONG_FILE = 220
_LEFT_OUT = "modeling_titan.py"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Package:
    """What was counted in one package."""

    lines_of_functions: list[int] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    """Of each function, without self and cls."""
    lines_of_files: list[int] = field(default_factory=list)
    undocumented: list[str] = field(default_factory=list)
    folders: Counter[str] = field(default_factory=Counter)
    """Files of each folder."""

    @classmethod
    def read(cls, root: Path, name: str) -> "Package":
        """Counts what is in the package `name` below `root`."""
        package = cls()
        for file in sorted((root / name).rglob("*.py")):
            if file.name != _LEFT_OUT:
                package._add(file, str(file.relative_to(root)))
        return package

    def _add(self, file: Path, shown: str) -> None:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.folders[str(Path(shown).parent)] += 1
        self.lines_of_files.append(len(text.splitlines()))
        for node in ast.walk(tree):
            if isinstance(node, _FUNCTIONS):
                self.lines_of_functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
                self.arguments.append(count_arguments(node.args))
        if ast.get_docstring(tree) is None and tree.body:
            self.undocumented.append(shown)
        self.undocumented += [f"{shown}: {name}" for name in undocumented_names(tree.body)]


def count_arguments(arguments: ast.arguments) -> int:
    """How many arguments a function takes, without self and cls."""
    named = [*arguments.posonlyargs, *arguments.args]
    own = named[1:] if named and named[0].arg in ("self", "cls") else named
    starred = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(own) + len(arguments.kwonlyargs) + starred


def undocumented_names(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods that have no docstring."""
    for node in body:
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented_names(node.body, f"{prefix}{node.name}.")


def spread(numbers: Sequence[int]) -> str:
    """The median, the 90th percentile and the largest of some numbers."""
    if not numbers:
        return "-"
    ordered = sorted(numbers)
    places = (round(share * (len(ordered) - 1)) for share in (0.5, 0.9, 1))
    return " / ".join(str(ordered[place]) for place in places)


def main() -> None:
    """Prints a table of the packages, then the files of each folder."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    packages = {name: Package.read(root, name) for name in PACKAGES}
    rows = [("", *PACKAGES)]
    for title, value in {
        "files": lambda p: str(len(p.lines_of_files)),
        "functions": lambda p: str(len(p.lines_of_functions)),
        "lines of a function, median / p90 / max": lambda p: spread(p.lines_of_functions),
        "arguments, median / p90 / max": lambda p: spread(p.arguments),
        "lines of a file, median / p90 / max": lambda p: spread(p.lines_of_files),
        f"files over {LONG_FILE} lines": lambda p: _share(p.lines_of_files),
        "public names without docstring": lambda p: str(len(p.undocumented)),
        "files in a folder, at most": lambda p: str(max(p.folders.values(), default=0)),
    }.items():
        rows.append((title, *map(value, packages.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)))
    print()
    for package in packages.values():
        print(", ".join(f"{folder} {count}" for folder, count in sorted(package.folders.items())))


def _share(lines: Sequence[int]) -> str:
    long = sum(count > LONG_FILE for count in lines)
    return f"{long} ({long / max(1, len(lines)):.0%})"


if __name__ == "__main__":
    main()
