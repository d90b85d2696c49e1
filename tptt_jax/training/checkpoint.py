"""Checkpoints: what was trained, never the frozen base, written so that a kill loses nothing.

A run's directory holds `checkpoint.json` (what to load the base from, and how) and
`checkpoints/<step>/` (orbax; a step appears under its name only once it is complete).
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from tptt_jax.model import CausalLM
from tptt_jax.training.partition import load_trainable, restore_targets
from tptt_jax.training.train_step import TrainState


def remove_checkpoints(path: str | os.PathLike[str]) -> None:
    """Removes the saved steps of an earlier run in this directory, if there are any."""
    shutil.rmtree(Path(path) / "checkpoints", ignore_errors=True)


def latest_step(path: str | os.PathLike[str]) -> int | None:
    """The last complete step of a run, or None."""
    folder = Path(path) / "checkpoints"
    if not folder.is_dir():
        return None
    with _manager(path, keep=None) as manager:
        return manager.latest_step()


def restore_trainable(path: str | os.PathLike[str], model: CausalLM) -> int:
    """Puts the last checkpoint's trained values into a model, in place.

    Args:
      path: a run's directory.
      model: built from the same source and description.

    Returns:
      The step it was saved at.

    Raises:
      ValueError: if there is no complete checkpoint, or it does not fit the model.
    """
    step = latest_step(path)
    if step is None:
        raise ValueError(f"{path} holds no complete checkpoint yet: run finetune again to resume.")
    with _manager(path, keep=None) as manager:
        # Named shapes and shardings: the devices that saved it need not be here.
        saved = manager.item_metadata(step)["weights"]
        shapes = {name: value.shape for name, value in saved["trainable"].items()}
        target: dict[str, Any] = {"trainable": restore_targets(model, shapes)}
        if "share" in saved:
            target["share"] = jax.ShapeDtypeStruct((), saved["share"].dtype)
        args = ocp.args.Composite(weights=ocp.args.StandardRestore(target))
        values = manager.restore(step, args=args)["weights"]
    load_trainable(model, values["trainable"], values.get("share"))
    return step


class RunCheckpoints:
    """Saves and resumes the whole state of a run; use as a context manager.

    Leaving the context waits for the write that is under way.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        """Opens `path`/checkpoints; the last `keep` steps are kept."""
        self._manager = _manager(path, keep=keep)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the write that is under way."""
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The last complete step."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing a state under its step; returns once its arrays are copied."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        weights, progress = _items(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(weights),
                progress=ocp.args.StandardSave(progress),
            ),
        )

    def restore(self, like: TrainState) -> TrainState:
        """The last complete state, with the shapes and shardings of `like`.

        Raises:
          ValueError: if there is none, or it was saved by a run with other trainable
            parameters.
        """
        weights, progress = _items(like)
        step = self._manager.latest_step()
        if step is None:
            raise ValueError("there is no complete checkpoint to resume from.")
        metadata = self._manager.item_metadata(step)
        for name, target in (("weights", weights), ("progress", progress)):
            _check_fits(metadata[name], target)
        weights, progress = jax.tree.map(ocp.utils.to_shape_dtype_struct, (weights, progress))
        saved: Mapping[str, Any] = self._manager.restore(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardRestore(weights),
                progress=ocp.args.StandardRestore(progress),
            ),
        )
        key = jax.random.wrap_key_data(saved["progress"]["key"])
        return TrainState(
            trainable=saved["weights"]["trainable"],
            opt_state=saved["progress"]["opt_state"],
            share=saved["weights"].get("share"),
            step=saved["progress"]["step"],
            key=key,
        )


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two parts of a checkpoint: what a model needs, and what training needs besides."""
    weights: dict[str, Any] = {"trainable": state.trainable}
    if state.share is not None:
        weights["share"] = state.share
    key = jax.random.key_data(state.key)
    return weights, {"opt_state": state.opt_state, "step": state.step, "key": key}


def _check_fits(saved: Any, target: Any) -> None:
    """Compares names and shapes before anything is read: orbax would stop half-way."""
    have, want = (
        {name: tuple(x.shape) for name, x in ocp.utils.to_flat_dict(tree, sep=".").items()}
        for tree in (saved, target)
    )
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"the checkpoint does not fit this run ({name} has shape {have.get(name)}, wanted "
                f"is {want.get(name)}): use another --output."
            )


def _manager(path: str | os.PathLike[str], *, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("weights", "progress")}
    folder = Path(path).resolve() / "checkpoints"
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
