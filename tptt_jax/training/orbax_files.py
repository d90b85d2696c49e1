"""Writes and reads trees of arrays in orbax's format, without its log output."""

import contextlib
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tptt_jax.error_text import first_line

PARTS = ("weights", "progress")
"""Parts of a checkpoint: weights for the model, and the rest for training."""
_GLOB_CHARACTERS = "*?["
# Above this size only names, shapes and files are verified, not every value.
_READ_AGAIN_BYTES = 64 * 2**20


def write_trees(folder: Path, trees: Mapping[str, Any]) -> None:
    """Writes trees of NumPy arrays, and verifies them.

    Args:
      folder: a new folder in an existing one.
      trees: by the name of their part: "weights" or "progress".

    Raises:
      OSError: if it cannot be written, in one line, or the files differ from the trees.
    """
    arguments: Any = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    try:
        with _quiet(), _plain_path(folder) as place:
            _checkpointer().save(place, args=ocp.args.Composite(**arguments))
        _check_written(folder, trees)
    # orbax passes on exceptions of asyncio, tensorstore and the system.
    except Exception as error:
        raise OSError(first_line(error, 300)) from error


def start_trees(folder: Path, trees: Mapping[str, Any]) -> Callable[[], None]:
    """Starts writing trees of arrays whose shards several processes hold.

    All processes must call this, with the same folder; each writes its own shards. It returns once
    the shards are copied to the host.

    Args:
      folder: a new folder in an existing one, without glob characters in its path.
      trees: as those of `write_trees`, of `jax.Array`.

    Returns:
      A function that waits until all processes have written; it raises OSError if one could not.
    """
    if any(character in str(folder.absolute()) for character in _GLOB_CHARACTERS):
        raise OSError(f"several processes cannot write below a name with one of {_GLOB_CHARACTERS}")
    handlers: Any = {name: ocp.StandardCheckpointHandler() for name in PARTS}
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
    arguments: Any = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    with _quiet():
        checkpointer.save(folder.absolute(), args=ocp.args.Composite(**arguments))

    def finish() -> None:
        try:
            with _quiet():
                checkpointer.wait_until_finished()
                checkpointer.close()
        except Exception as error:
            raise OSError(first_line(error, 300)) from error

    return finish


def read_shapes(folder: Path, part: str) -> Any:
    """The tree of a part, with `shape` and `dtype` for each array; other parts are not read."""
    with _quiet(), _plain_path(folder) as place:
        # A damaged part that nobody needs would leave failed reads behind, which asyncio prints.
        return ocp.StandardCheckpointHandler().metadata(epath.Path(place) / part)


def read_trees(folder: Path, targets: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads trees.

    Args:
      folder: a folder by `write_trees`.
      targets: by part, trees of arrays or `jax.ShapeDtypeStruct` with shapes and shardings.
    """
    arguments: Any = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
    with _quiet(), _plain_path(folder) as place:
        return _checkpointer().restore(place, args=ocp.args.Composite(**arguments))


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted path."""
    flat = ocp.utils.to_flat_dict(tree, sep=".")
    return {name: tuple(np.shape(x) if np.isscalar(x) else x.shape) for name, x in flat.items()}


def _check_written(folder: Path, trees: Mapping[str, Any]) -> None:
    """Raises OSError unless the files hold these trees, so a faulty disk is detected at once."""
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
                raise OSError("the values read differ from those written")


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
    """Silences orbax for one call, without changing other loggers.

    The threads of a call that failed may still log later, so the filter stays then.
    """
    _ignore_late_results()
    logger, silence = logging.getLogger("absl"), _NotOrbax()
    logger.addFilter(silence)
    yield
    logger.removeFilter(silence)


@functools.cache
def _ignore_late_results() -> None:
    """Silences reads and writes that end after another one failed, for the rest of the process.

    tensorstore's threads report them to an event loop that is closed by then, which would print
    one traceback each.
    """
    previous = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            previous(unraisable)

    sys.unraisablehook = report
