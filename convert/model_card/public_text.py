"""Text for other people: paths of this machine become names of files."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from convert.sources import parse_hub_name

# Quotes and punctuation around a word of a sentence stay; URLs are words.
_WORD = re.compile(r"[a-z][a-z0-9+]*://\S+|[^\s'\"`,;:()\[\]{}=<>|]+")
_DATA_FILE = re.compile(r"\.(gguf|jsonl|ndjson|json|csv|tsv|parquet|txt|md|yaml|yml|gz|zst)$")


def is_local_path(word: str) -> bool:
    """Whether a word names a place on this machine; hub ids, URLs and plain names do not."""
    if "/" not in word.strip("/") and not word.startswith(("/", "~")):
        return False
    if re.match(r"[a-z][a-z0-9+]*://", word):
        return False
    return (
        word.startswith(("/", "~", "./", "../"))
        or parse_hub_name(word) is None
        or _DATA_FILE.search(word.lower()) is not None
        or _exists(word)
    )


def _exists(word: str) -> bool:
    try:
        return Path(word).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def public_word(word: str) -> str:
    """A name, or the last part of a local path."""
    if not is_local_path(word) or not word.strip("/"):
        return word
    return PurePosixPath(word).name or word.strip("/")


def local_paths(value: Any) -> list[str]:
    """The texts in a value of JSON, or words of a command, that are paths of this machine."""
    if isinstance(value, Mapping):
        return local_paths(list(value.values()))
    if isinstance(value, list | tuple):
        return [path for each in value for path in local_paths(each)]
    return [value] if isinstance(value, str) and is_local_path(value) else []


def command_words(command: str) -> list[str]:
    """The words of a command, and the values of its --name=value."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return words + [word.partition("=")[2] for word in words if word.startswith("-")]


def name_paths(value: Any, paths: list[str]) -> Any:
    """A value of JSON with names in place of known paths, which may hold blanks."""
    if isinstance(value, Mapping):
        return {key: name_paths(each, paths) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [name_paths(each, paths) for each in value]
    if isinstance(value, str):
        for path in sorted(paths, key=len, reverse=True):
            value = value.replace(path, public_word(path))
    return value


def public_text(text: str) -> str:
    """A sentence without folders of this machine."""
    # A path with blanks is only seen whole where it is quoted.
    quoted = re.sub(r"'(/[^'\n]*)'", lambda found: f"'{public_word(found[1])}'", text)
    return _WORD.sub(lambda found: public_word(found[0]), quoted)


def public_command(command: str) -> str:
    """A shell command without folders of this machine."""
    try:
        words = shlex.split(command)
    except ValueError:
        return public_text(command)
    return shlex.join(map(_public_argument, words))


def _public_argument(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and name.startswith("-"):
        return f"{name}={public_word(value)}"
    return public_word(word)


def public_value(value: Any) -> Any:
    """A value of JSON or YAML, in which every text is public."""
    if isinstance(value, Mapping):
        return {key: public_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(each) for each in value]
    if not isinstance(value, str):
        return value
    return public_word(value) if is_local_path(value) else public_text(value)
