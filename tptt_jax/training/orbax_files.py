"""Trees of arrays in orbax's format: written, read, and kept quiet about."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PARTS = ("weights", "progress")
"""Of a checkpoint: what a model needs, and what training needs besides."""
_GLOB_CHARACTERS = "*?["
# Above this, names, shapes and files are looked at, but not every value is read again.
_READ_AGAIN_BYTES = 64 * 2**20


def write_trees(folder: Path, trees: Mapping[str, Any]) -> None:
    """Writes trees of numpy arrays, and reads them back.

    Args:
      folder: does not exist yet, its parent does.
      trees: by the name of their part: "weights" or "progress".

    Raises:
      OSError: if it cannot be written, in one line, or what lies there is something else.
    """
    arguments: Any = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    try:
        with _quiet(), _plain_path(folder) as place:
            _checkpointer().save(place, args=ocp.args.Composite(**arguments))
        _check_written(folder, trees)
    # orbax lets pass what asyncio, tensorstore and the system raise.
    except Exception as error:
        raise OSError(first_line(error, 300)) from error


def read_shapes(folder: Path, part: str) -> Any:
    """A tree of what a part holds, with `shape` and `dtype`."""
    with _quiet(), _plain_path(folder) as place:
        found: Any = _checkpointer().metadata(place)
        return found.item_metadata[part]


def read_trees(folder: Path, targets: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads trees.

    Args:
      folder: what `write_trees` wrote.
      targets: by part, trees of `jax.ShapeDtypeStruct` or arrays to be like.
    """
    arguments: Any = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
    with _quiet(), _plain_path(folder) as place:
        return _checkpointer().restore(place, args=ocp.args.Composite(**arguments))


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted path."""
    flat = ocp.utils.to_flat_dict(tree, sep=".")
    return {name: tuple(np.shape(x) if np.isscalar(x) else x.shape) for name, x in flat.items()}


def _check_written(folder: Path, trees: Mapping[str, Any]) -> None:
    """Raises OSError unless the files hold these trees: a disk that lies is found out at once."""
    for part, tree in trees.items():
        if flat_shapes(read_shapes(folder, part)) != flat_shapes(tree):
            raise OSError(f"{part} was not written as a whole")
        if not (folder / part / "manifest.ocdbt").is_file():
            raise OSError(f"{part} was written without its index")
    size = sum(x.nbytes for x in jax.tree.leaves(dict(trees)))
    if size > _READ_AGAIN_BYTES:
        return
    found = read_trees(folder, trees)
    pairs = ((dict(found)[part], tree) for part, tree in trees.items())
    for read, written in pairs:
        for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(written), strict=True):
            if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                raise OSError("other values are read than were written")


def _checkpointer() -> ocp.Checkpointer:
    handlers: Any = {name: ocp.StandardCheckpointHandler() for name in PARTS}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Yields a path to the folder without glob characters.

    orbax globs its files by their whole path: in "runs/exp[1]" it would find none of them.
    """
    folder = folder.absolute()
    if not any(character in str(folder) for character in _GLOB_CHARACTERS):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="tptt-jax-") as temporary:
        if any(character in temporary for character in _GLOB_CHARACTERS):
            raise ValueError(
                f"{folder} and {temporary} both have one of {_GLOB_CHARACTERS} in their names: "
                "rename the folder, or set TMPDIR to another one."
            )
        link = Path(temporary) / "link"
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


class _NotOrbax(logging.Filter):
    """Drops orbax's log records: its failures raise exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record stays."""
        return f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax silent for one call: how others log is the caller's affair."""
    logger, silence = logging.getLogger("absl"), _NotOrbax()
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def first_line(error: Exception, length: int) -> str:
    """What an error says in one line of at most so many characters, or its name."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # tensorstore adds the whole specification of what it tried.
    return text.partition(" [tensorstore_spec")[0][:length]
