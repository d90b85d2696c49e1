"""GGUF models in several files: ``name-00001-of-00003.gguf`` and so on."""

import re
from pathlib import Path

from convert.errors import ConversionError, listing

_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def all_parts(path: Path) -> list[Path]:
    """All parts of a file's model, by its name; the file itself if the model has one part.

    Raises:
      ConversionError: if a part is missing.
    """
    match = _PART.fullmatch(path.name)
    count = 1 if match is None else int(match["count"])
    if match is None or count == 0:
        return [path]
    names = (f"{match['name']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1))
    parts = [path.with_name(name) for name in names]
    here = {each.name for each in path.parent.iterdir()} if path.parent.is_dir() else set()
    missing = [part.name for part in parts if part.name not in here]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConversionError(
            f"{path.name} is one of {count} parts; {', '.join(missing[:3])}{more} must be in the "
            f"same folder ({path.parent}): fetch the missing parts."
        )
    return parts


def find_gguf(directory: Path) -> Path | None:
    """The GGUF model in a directory, by its first part; None if there is none.

    Raises:
      ConversionError: if there are several, or a part is missing.
    """
    files = sorted(path for path in directory.glob("*.gguf") if path.is_file())
    models = {_name(path): path for path in reversed(files)}
    if len(models) > 1:
        raise ConversionError(
            f"{directory} holds several GGUF models ({listing(models)}); give a file of one."
        )
    for path in models.values():
        return all_parts(path)[0]
    return None


def _name(path: Path) -> str:
    """The common name of all parts of a model."""
    match = _PART.fullmatch(path.name)
    return path.name if match is None else f"{match['name']} in {int(match['count'])} parts"
