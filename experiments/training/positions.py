"""Where a run stands in streamed data: a file beside each checkpoint."""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from tptt_jax.durable import atomic_file
from tptt_jax.processes import is_first_process
from tptt_jax.training.step_folders import list_steps

_FOLDER = "positions"
_RECENT = 3


def save_position(output: Path, step: int, position: Int[np.ndarray, "D B 2"]) -> None:
    """Writes the position after a step; call it before the checkpoint of that step is saved.

    All processes call this. Old positions without a checkpoint are removed.

    Args:
      output: directory of the run.
      step: steps that are done.
      position: of this process's lanes; zeros, or what all knew when they began, for the others.

    Raises:
      OSError: if it cannot be written.
    """
    position = _of_all(position)
    if not is_first_process():
        return
    folder = output / _FOLDER
    with atomic_file(_file(output, step)) as path, path.open("wb") as stream:
        np.save(stream, position)
    steps = sorted(int(file.stem) for file in folder.glob("*.npy") if file.stem.isdecimal())
    # The checkpoint before may still be on its way to the disk.
    recent = [each for each in steps if each <= step][-_RECENT:]
    for each in set(steps).difference(recent, list_steps(output / "checkpoints")):
        _file(output, each).unlink(missing_ok=True)


def read_position(output: Path, step: int) -> Int[np.ndarray, "D B 2"]:
    """The position after a step.

    Raises:
      ValueError: if it is missing or damaged.
    """
    file = _file(output, step)
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{file}, which says where step {step} was in the data, cannot be read ({error}): "
            "restore it from a copy, or start in another --output."
        ) from None


def _of_all(position: Int[np.ndarray, "D B 2"]) -> Int[np.ndarray, "D B 2"]:
    """Each lane's position from the process that reads it: the greatest, as positions only grow."""
    if jax.process_count() == 1:
        return position
    # JAX has no 64-bit integers here.
    halves = multihost_utils.process_allgather(np.ascontiguousarray(position).view(np.int32))
    gathered = np.ascontiguousarray(halves).view(np.int64)
    order = gathered[..., 0] * 2**32 + gathered[..., 1]
    furthest = order.argmax(axis=0)[None, ..., None]
    return np.take_along_axis(gathered, furthest, axis=0)[0]


def _file(output: Path, step: int) -> Path:
    return output / _FOLDER / f"{step}.npy"
