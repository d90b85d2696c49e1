"""The files of a model's directory that an export copies, and those that it leaves out."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from convert.errors import ConversionError, listing
from convert.formats.hf_directory import INDEX_FILE, SINGLE_FILE
from convert.notices import print_notice

VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json"),
    *("vocab.json", "vocab.txt"),
)
"""A directory with none of these has no tokenizer."""
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Exports copy these names and no others, beside the templates below."""
_TEMPLATES, _TEMPLATE_SUFFIX = "additional_chat_templates", ".jinja"
# Rewritten from what was read, not copied.
_REWRITTEN = ("config.json", "generation_config.json", SINGLE_FILE, INDEX_FILE)
_SHARDS = "model-*-of-*.safetensors"
_MAX_NAMED = 12


def copy_tokenizer_files(source: Path, directory: Path) -> None:
    """Copies the tokenizer of a model: regular files of known names, never code.

    Args:
      source: the model's directory.
      directory: an existing directory. Every file is the same there, byte for byte.

    Raises:
      ConversionError: if tokenizer.json is a link out of the model's folder, or a file cannot be
        copied.
    """
    refuse_outer_link(source / "tokenizer.json", source)
    for file in _copied(source):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        try:
            # Copy only the content: no permissions, and never a link.
            shutil.copyfile(file, copy)
        except OSError as error:  # which names the source, whatever the reason
            raise ConversionError(
                f"{file} cannot be copied to {directory}: {error.strerror}; check the space and "
                "the permissions of both."
            ) from None


def report_skipped_files(source: Path) -> None:
    """Prints one line for links that are not followed, and one for files that are not exported."""
    outer = {path for path in _exportable(source) if is_outer_link(path, source)}
    if outer:
        named = listing(sorted(path.relative_to(source).as_posix() for path in outer))
        print_notice(f"links out of the model's folder are not copied: {named} ({source})")
    known = {*_copied(source), *source.glob(_SHARDS), *(source / name for name in _REWRITTEN)}
    known |= outer
    # A card of its own says the licence.
    known |= {*source.glob("README.md"), *source.glob("LICEN[CS]E*")}
    others = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in source.iterdir()
        if path not in known and not _is_template_folder(path, known)
    ]
    if not others:
        return
    more = "" if len(others) <= _MAX_NAMED else f" and {len(others) - _MAX_NAMED} more"
    named = listing(sorted(others)[:_MAX_NAMED])
    print_notice(f"exports copy only tokenizer files; left out: {named}{more} ({source})")


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether a path is a regular file in a model's folder, after following links.

    A snapshot in the cache of the Hugging Face hub consists of links to the blobs beside it, which
    belong to the model.
    """
    try:
        place, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    homes = [home]
    # A model may also be a folder inside a snapshot.
    homes += [each.parent / "blobs" for each in home.parents if each.name == "snapshots"]
    return path.is_file() and any(place.is_relative_to(each) for each in homes)


def is_outer_link(path: Path, folder: Path) -> bool:
    """Whether a path leads to a regular file outside the model's folder."""
    return path.is_file() and not is_own_file(path, folder)


def refuse_outer_link(path: Path, folder: Path) -> None:
    """Refuses to export a model whose essential file is a link out of its folder.

    Raises:
      ConversionError: if `path` is a link out of the model's folder.
    """
    if is_outer_link(path, folder):
        raise ConversionError(
            f"{path} must be a file in the model's own folder to be exported, it is a link to "
            f"{path.resolve()}: replace the link by a copy of that file (cp --remove-destination)."
        )


def _names(source: Path) -> list[Path]:
    """Possible paths of a directory's tokenizer files."""
    names = [source / name for name in TOKENIZER_FILES]
    if (source / _TEMPLATES).is_dir():
        names += sorted((source / _TEMPLATES).glob(f"*{_TEMPLATE_SUFFIX}"))
    return names


def _exportable(source: Path) -> list[Path]:
    """The same, and the settings that an export includes."""
    return [*_names(source), source / "config.json", source / "generation_config.json"]


def _copied(source: Path) -> Iterator[Path]:
    """The tokenizer files of a directory."""
    yield from (path for path in _names(source) if is_own_file(path, source))


def _is_template_folder(path: Path, known: set[Path]) -> bool:
    if path.name != _TEMPLATES or not path.is_dir():
        return False
    return {*path.iterdir()} <= known
