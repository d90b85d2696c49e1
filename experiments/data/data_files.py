"""Which files a data argument names: paths, folders, patterns, data sets of the Hub; by split."""

import glob
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from experiments.data.file_rows import kind_of
from experiments.data.hub_files import hub_files
from experiments.data.hub_rows import folder_files, slice_splits
from tptt_jax.error_text import first_line

PYTHON_DOCS = "python-docs"
"""Names the demo text, the Python language reference that comes with every CPython."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_NAMES = re.compile(r"(?:^|\+)\s*([^\[\]+\s]+)")

_File = TypeVar("_File")


class FoundData(NamedTuple):
    """What a data argument names.

    Attributes:
      paths: the argument.
      is_hub: whether it is a data set of the Hugging Face Hub.
      files: those that we read ourselves, by split, in order. None: "python-docs", or something
        that only `datasets` can read.
      parts: the data sets that are kept apart; none: all is one data set.
    """

    paths: tuple[str, ...]
    is_hub: bool
    files: dict[str, list[Path]] | None
    parts: tuple["FoundData", ...] = ()

    @property
    def shown(self) -> str:
        """For messages."""
        return " ".join(self.paths)


def find_data(
    path: str | Sequence[str],
    split: str = "train",
    revision: str | None = None,
    *,
    leave_out: Path | None = None,
) -> FoundData:
    """Finds the files that `load_rows` reads; those of the Hub are downloaded.

    Args:
      path: of `load_rows`.
      split: or a slice of it, or several.
      revision: branch, tag or commit of a Hub data set.
      leave_out: a folder whose files are no data, as a run's own.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if the split is not there, a file is none that can be read, or a revision is given
        for something else than a data set of the Hub.
    """
    paths = (path,) if isinstance(path, str) else tuple(path)
    shown = " ".join(paths)
    is_hub = len(paths) == 1 and is_hub_id(paths[0])
    if revision is not None and not is_hub:
        raise ValueError(
            f"--data.revision {revision} is for datasets on the Hugging Face Hub, but {shown} is "
            "local: leave it out."
        )
    if paths == (PYTHON_DOCS,):
        return FoundData(paths, False, None)
    if is_hub:
        listed = hub_files(shown, revision)
        files = None
        if listed is not None:
            wanted = _of_split(shown, split, listed)
            files = {name: [file.fetch() for file in each] for name, each in wanted.items()}
        return FoundData(paths, True, files)
    splits = _find_local(paths, leave_out)
    return FoundData(paths, False, None if splits is None else _of_split(shown, split, splits))


def find_parts(
    path: str | Sequence[str],
    split: str = "train",
    revision: str | None = None,
    *,
    separate: bool = False,
    leave_out: Path | None = None,
) -> FoundData:
    """`find_data`, also of several data sets that are kept apart.

    Args:
      path: of `find_data`; kept apart, each may be a data set of the Hub.
      split: of each of them.
      revision: of those of the Hub.
      separate: whether each path is a data set of its own.
      leave_out: as that of `find_data`.
    """
    if not separate or isinstance(path, str):
        return find_data(path, split, revision, leave_out=leave_out)
    parts = tuple(
        find_data(each, split, revision if is_hub_id(each) else None, leave_out=leave_out)
        for each in path
    )
    files: dict[str, list[Path]] | None = {}
    for part in parts:
        if part.files is None:
            files = None
            break
        for name, found in part.files.items():
            files.setdefault(name, []).extend(found)
    return FoundData(tuple(path), any(part.is_hub for part in parts), files, parts)


def _of_split(shown: str, split: str, splits: dict[str, list[_File]]) -> dict[str, list[_File]]:
    """The files of the splits that an expression names."""
    # An unknown split is refused before anything is read.
    check_split(shown, split, dict.fromkeys(splits, 1 << 40))
    wanted = [split] if split in splits else _SPLIT_NAMES.findall(split)
    return {name: splits[name] for name in dict.fromkeys(wanted) if name in splits}


def check_split(shown: str, split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """`slice_splits`, which says what cannot be read."""
    try:
        return slice_splits(split, lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"Cannot read {shown} as a dataset: {first_line(error)}: give --data.split a split, or "
            'a slice of it such as "train[:500]".'
        ) from error


def _find_local(paths: Sequence[str], leave_out: Path | None) -> dict[str, list[Path]] | None:
    """The files of each split; None: a folder that only `datasets` can read."""
    splits: dict[str, list[Path]] = {}
    for each in paths:
        found = _find_files(each, leave_out)
        if found is None:
            if len(paths) > 1:
                raise ValueError(f"{each} cannot be read beside other data: give it alone.")
            return None
        for name, files in found.items():
            splits.setdefault(name, []).extend(files)
    return splits


def is_hub_id(path: str) -> bool:
    """Whether `path` can only be a dataset on the Hugging Face Hub."""
    file = Path(path).expanduser()
    return (
        path != PYTHON_DOCS
        and not file.exists()
        and kind_of(file) is None
        and bool(_HUB_ID.fullmatch(path))
    )


def _find_files(path: str, leave_out: Path | None) -> dict[str, list[Path]] | None:
    """The files that a path names, by split; None: a folder that only `datasets` can read."""
    file = Path(path).expanduser()
    if file.is_file():
        return {"train": [file]}
    if file.is_dir():
        return _find_in_folder(file, leave_out)
    _refuse_special(file)
    if glob.has_magic(path):
        found = sorted(map(Path, glob.glob(str(file), recursive=True)))
        found = [each for each in found if not each.is_dir() and not _is_below(each, leave_out)]
        if not found:
            raise FileNotFoundError(f"No file matches {path}: check the pattern.")
        for each in found:
            _refuse_special(each)
        return {"train": found}
    if path == PYTHON_DOCS:
        raise ValueError(f"{path} must be given alone.")
    if is_hub_id(path):
        raise ValueError(f"{path} is not a local file, and a Hub dataset must be given alone.")
    raise FileNotFoundError(f"no such file: {path}; check the path.")


def _find_in_folder(folder: Path, leave_out: Path | None) -> dict[str, list[Path]] | None:
    known = [file for file in sorted(folder.rglob("*")) if kind_of(file) and not file.is_dir()]
    known = [file for file in known if not _is_below(file, leave_out)]
    for file in known:
        _refuse_special(file)
    is_whole = leave_out is None or not leave_out.exists() or not _is_below(leave_out, folder)
    if is_whole and not any(file.suffix.lower() == ".zst" for file in known):
        return folder_files(folder)
    return _stand_in_files(folder, leave_out)


def _stand_in_files(folder: Path, leave_out: Path | None) -> dict[str, list[Path]] | None:
    """`folder_files` of a folder of links, without ".zst", which `datasets` does not know."""
    with tempfile.TemporaryDirectory() as temporary:
        root, originals = Path(temporary).resolve(), {}
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or _is_below(file, leave_out):
                continue
            link = root / file.relative_to(folder)
            link = link.with_suffix("") if link.suffix.lower() == ".zst" else link
            if link in originals:
                raise ValueError(f"{originals[link]} and {file} have the same name: remove one.")
            originals[link] = file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        found = folder_files(root, shown=folder)
    return found and {split: [originals[file] for file in files] for split, files in found.items()}


def _is_below(file: Path, folder: Path | None) -> bool:
    return folder is not None and file.absolute().is_relative_to(folder.absolute())


def _refuse_special(file: Path) -> None:
    """Raises ValueError for pipes, devices and sockets."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(
            f"{file} is a device, a pipe or a socket, not a regular file: write the data into a "
            "file first."
        )
