"""The licence of a base model, from its README.md, its LICENSE file or its GGUF header."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from convert.errors import ConversionError
from convert.formats import GgufFile
from convert.sources.source_files import is_own_file

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
# What a licence's text begins with, and the hub's name for it.
_TEXTS = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"gemma terms of use": "gemma",
    r"llama 3\.3 community license": "llama3.3",
    r"llama 3\.2 community license": "llama3.2",
    r"llama 3\.1 community license": "llama3.1",
    r"meta llama 3 community license": "llama3",
    r"llama 2 community license": "llama2",
    r"bsd 3-clause": "bsd-3-clause",
    r"gnu general public license\s+version 3": "gpl-3.0",
}
_LONGEST_TEXT = 4000
_KEYS = ("license", "license_name", "license_link")


class BaseFacts(NamedTuple):
    """What a base model's own files say of it.

    Attributes:
      license: `license`, `license_name` and `license_link` as front matter has them; empty if the
        licence is unknown.
      base_model: ids of the models that it was made from.
    """

    license: dict[str, str]
    base_model: tuple[str, ...] = ()


def read_base_facts(path: Path) -> BaseFacts:
    """Reads the licence and the origin of a base model.

    Args:
      path: a Hugging Face directory or a GGUF file.

    Returns:
      What is known; nothing is guessed.
    """
    if path.is_file():
        return _of_gguf(path)
    head = read_front_matter(path / "README.md") if _is_own(path, "README.md") else {}
    named = head.get("base_model")
    names = tuple(each for each in (named if isinstance(named, list) else [named]) if each)
    if isinstance(head.get("license"), str):
        return BaseFacts(_texts(head), tuple(map(str, names)))
    for name in _FILES:
        if _is_own(path, name) and (found := _recognise(path / name)):
            return BaseFacts({"license": found}, tuple(map(str, names)))
    return BaseFacts({}, tuple(map(str, names)))


def _is_own(folder: Path, name: str) -> bool:
    return is_own_file(folder / name, folder)


def _of_gguf(path: Path) -> BaseFacts:
    try:
        metadata = GgufFile(path).metadata
    except ConversionError:
        return BaseFacts({})
    head = {
        "license": metadata.get("general.license"),
        "license_name": metadata.get("general.license.name"),
        "license_link": metadata.get("general.license.link"),
    }
    source = metadata.get("general.source.huggingface.repository")
    url = metadata.get("general.base_model.0.repo_url") or metadata.get("general.source.url")
    if source is None and isinstance(url, str):
        found = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/?", url)
        source = found[1] if found else None
    return BaseFacts(_texts(head), () if source is None else (str(source),))


def _texts(head: dict[str, Any]) -> dict[str, str]:
    known = {key: head[key] for key in _KEYS if isinstance(head.get(key), str) and head[key]}
    return known if "license" in known else {}


def _recognise(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")[:_LONGEST_TEXT].lower()
    except OSError:
        return None
    return next((name for start, name in _TEXTS.items() if re.search(start, text)), None)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card and the text after it; an empty one if there is none."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        head = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}, text
    return (head, text[found.end() :]) if isinstance(head, dict) else ({}, text)


def read_front_matter(file: Path) -> dict[str, Any]:
    """The front matter of a README.md; empty if it has none, or it cannot be read."""
    try:
        return split_card(file.read_text(encoding="utf-8", errors="replace"))[0]
    except OSError:
        return {}
