"""Checkpoints of trained parameters, without the frozen base; a kill loses nothing.

A run's directory holds `checkpoint.json` (the source of the base and its settings) and
`checkpoints/<step>/` (orbax; a step appears under its name only once it is complete and on disk).
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

from tptt_jax.model import CausalLM
from tptt_jax.training.checkpoint_contents import check_finite
from tptt_jax.training.newest_step import CheckpointMisfit, read_newest
from tptt_jax.training.orbax_files import PARTS, read_shapes, read_trees
from tptt_jax.training.partition import load_trainable, restore_targets
from tptt_jax.training.run_checkpoints import RunCheckpoints
from tptt_jax.training.step_folders import (
    DamagedStep,
    check_step,
    checkpoint_folder,
    last_step,
    list_steps,
    remove_leftovers,
    remove_steps,
)

__all__ = [
    "RunCheckpoints",
    "latest_sound_step",
    "latest_step",
    "remove_checkpoints",
    "remove_checkpoints_after",
    "restore_trainable",
]


def remove_checkpoints(path: str | os.PathLike[str]) -> None:
    """Removes the saved steps of an earlier run in this directory, if there are any.

    Other files stay.
    """
    folder = checkpoint_folder(path)
    # Leftovers first: one of them may be a step that gets its name back.
    remove_leftovers(folder)
    remove_steps(folder, list_steps(folder))


def remove_checkpoints_after(path: str | os.PathLike[str], step: int) -> None:
    """Removes the saved steps of this directory that come after `step`."""
    folder = checkpoint_folder(path)
    remove_steps(folder, [each for each in list_steps(folder) if each > step])


def latest_step(path: str | os.PathLike[str]) -> int | None:
    """The last complete step of a run, or None; its files are not checked for damage."""
    return last_step(checkpoint_folder(path))


def latest_sound_step(path: str | os.PathLike[str]) -> int | None:
    """The last undamaged step, or None.

    Raises:
      OSError: if its files exist but cannot be read.
    """
    folder = checkpoint_folder(path)
    for step in reversed(list_steps(folder)):
        with contextlib.suppress(DamagedStep):
            check_step(folder / str(step), PARTS)
            return step
    return None


def restore_trainable(path: str | os.PathLike[str], model: CausalLM) -> int:
    """Loads the trained values of the last readable checkpoint into a model, in place.

    Checkpoints that are damaged, or hold values that are not finite, are skipped with a warning in
    the log.

    Args:
      path: a run's directory.
      model: built from the same source and description.

    Returns:
      The step it was saved at.

    Raises:
      ValueError: if there is no complete checkpoint, all are damaged, or it does not fit the
        model.
      OSError: if a sound checkpoint cannot be read now.
    """

    def read(folder: Path) -> dict[str, Any]:
        # Give shapes and shardings: the devices that saved it may be absent.
        saved = read_shapes(folder, "weights")
        shapes = {name: value.shape for name, value in saved["trainable"].items()}
        try:
            target: dict[str, Any] = {"trainable": restore_targets(model, shapes)}
        except ValueError as error:
            raise CheckpointMisfit(str(error)) from None
        if "share" in saved:
            target["share"] = jax.ShapeDtypeStruct((), saved["share"].dtype)
        values = read_trees(folder, {"weights": target})["weights"]
        check_finite(values)
        return values

    if latest_step(path) is None:
        raise ValueError(f"{path} holds no complete checkpoint yet: run finetune again to resume.")
    newest = read_newest(checkpoint_folder(path), ("weights",), read)
    load_trainable(model, newest.content["trainable"], newest.content.get("share"))
    return newest.step
