"""Checkpoints of trained parameters, without the frozen base; a kill loses nothing.

A run's directory holds `checkpoint.json` (the source of the base and its settings) and
`checkpoints/<step>/` (orbax; a step appears under its name only once it is complete and on disk).
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tptt_jax.model import CausalLM
from tptt_jax.processes import failing_together, from_first, is_first_process, wait_for_all
from tptt_jax.training.newest_step import CheckpointMisfit, NewestStep, read_newest
from tptt_jax.training.orbax_files import (
    PARTS,
    flat_shapes,
    read_shapes,
    read_trees,
    start_trees,
    write_trees,
)
from tptt_jax.training.partition import load_trainable, restore_targets
from tptt_jax.training.step_folders import (
    DamagedStep,
    check_step,
    fill_step,
    list_steps,
    remove_leftovers,
    remove_steps,
    start_step,
    write_step,
)
from tptt_jax.training.train_step import TrainState

_LOG = logging.getLogger(__name__)


def remove_checkpoints(path: str | os.PathLike[str]) -> None:
    """Removes the saved steps of an earlier run in this directory, if there are any.

    Other files stay.
    """
    folder = _folder(path)
    # Leftovers first: one of them may be a step that gets its name back.
    remove_leftovers(folder)
    remove_steps(folder, list_steps(folder))


def remove_checkpoints_after(path: str | os.PathLike[str], step: int) -> None:
    """Removes the saved steps of this directory that come after `step`."""
    folder = _folder(path)
    remove_steps(folder, [each for each in list_steps(folder) if each > step])


def latest_step(path: str | os.PathLike[str]) -> int | None:
    """The last complete step of a run, or None; its files are not checked for damage."""
    steps = list_steps(_folder(path))
    return steps[-1] if steps else None


def latest_sound_step(path: str | os.PathLike[str]) -> int | None:
    """The last undamaged step, or None.

    Raises:
      OSError: if its files exist but cannot be read.
    """
    folder = _folder(path)
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
        _check_finite(values)
        return values

    if latest_step(path) is None:
        raise ValueError(f"{path} holds no complete checkpoint yet: run finetune again to resume.")
    newest = read_newest(_folder(path), ("weights",), read)
    load_trainable(model, newest.content["trainable"], newest.content.get("share"))
    return newest.step


class RunCheckpoints:
    """Saves and resumes the whole state of a run; use as a context manager.

    Leaving the context waits for the pending write.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        """Opens `path`/checkpoints; the last `keep` steps are kept.

        Raises:
          OSError: if the folder cannot be made.
        """
        self._folder = _folder(path)
        self._keep = keep
        if is_first_process():
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder)
        wait_for_all("checkpoints")
        self._known: int | None = None
        self._damaged: tuple[int, ...] = ()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the pending write; its failure never hides another error."""
        try:
            # After an error other processes may be elsewhere.
            self.wait() if error is None else self._wait()
        except OSError as failure:
            if error is None:
                raise
            _LOG.warning("%s", failure)
        finally:
            self._writer.shutdown()

    @property
    def latest_step(self) -> int | None:
        """The last complete step."""
        steps = list_steps(self._folder)
        return steps[-1] if steps else None

    def save(self, state: TrainState) -> None:
        """Starts writing a state under its step; returns once its arrays are copied.

        Raises:
          OSError: if the previous write failed.
        """
        self.wait()
        step = int(state.step)
        if step == self._known:
            return
        trees: dict[str, Any] = dict(zip(PARTS, _items(state), strict=True))
        with self._plain_errors(step):
            write = self._start_write(step, trees)
        self._pending = self._writer.submit(self._write, step, write)
        self._known = step

    def check(self) -> None:
        """Raises OSError if this process's write has failed; waits for nothing and nobody."""
        pending = self._pending
        if pending is not None and pending.done() and pending.exception() is not None:
            self._wait()

    def wait(self) -> None:
        """Waits until the saved step is on disk and verified, in all processes.

        Raises:
          OSError: if it could not be written.
        """
        if self._wait():
            # Others have written, but process 0 may still have to give the step its name.
            wait_for_all("checkpoint")

    def _wait(self) -> bool:
        """Whether there was something to wait for."""
        is_pending = self._pending is not None
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except BaseException:
                # Saving the same step again is to write it.
                self._known = None
                raise
        return is_pending

    def restore(self, like: TrainState, *, sound: int | None = None) -> TrainState:
        """The last readable state, with the shapes and shardings of `like`.

        Damaged ones are skipped with a warning in the log.

        Args:
          like: the state of a new run.
          sound: what `latest_sound_step` has found a moment ago; it is not hashed again.

        Raises:
          ValueError: if there is none, all are damaged, or it was saved by a run with other
            trainable parameters.
          OSError: if an undamaged one cannot be read now.
        """
        parts = dict(zip(PARTS, _items(like), strict=True))
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, parts)

        def read(folder: Path) -> Any:
            for name, target in parts.items():
                _check_fits(read_shapes(folder, name), target)
            values = read_trees(folder, targets)
            _check_finite(values["weights"])
            return values

        if self.latest_step is None:
            raise ValueError(
                "there is no complete checkpoint to resume from: train from the start."
            )
        newest = self._read_newest(read, sound)
        saved, self._known, self._damaged = newest.content, newest.step, newest.damaged
        key = jax.random.wrap_key_data(saved["progress"]["key"])
        return TrainState(
            trainable=saved["weights"]["trainable"],
            opt_state=saved["progress"]["opt_state"],
            share=saved["weights"].get("share"),
            step=saved["progress"]["step"],
            key=key,
        )

    def _read_newest(self, read: Callable[[Path], Any], sound: int | None) -> NewestStep[Any]:
        if jax.process_count() == 1:
            return read_newest(self._folder, PARTS, read, sound=sound)
        chosen: NewestStep[Any] = NewestStep(0, None, ())
        with failing_together():
            # Process 0 chooses for all: reading waits for every process.
            if is_first_process():
                chosen = read_newest(self._folder, PARTS, lambda folder: None, sound=sound)
        step = from_first(chosen.step)
        return NewestStep(step, read(self._folder / str(step)), chosen.damaged)

    def _start_write(self, step: int, trees: dict[str, Any]) -> Callable[[], None]:
        """Copies the arrays; the result writes them."""
        # Optimizers may hold infinity from the start; weights never do.
        if jax.process_count() == 1:
            # The next step may reuse the state's memory during the write.
            copies = jax.tree.map(lambda x: np.array(x, copy=True), trees)

            def write() -> None:
                _check_finite(copies["weights"])
                write_step(self._folder, step, lambda place: write_trees(place, copies))

            return write
        _check_finite(trees["weights"])
        partial = start_step(self._folder, step, clean=is_first_process())
        finish = start_trees(partial, trees)
        if not is_first_process():
            return finish
        return lambda: fill_step(self._folder, step, partial, lambda place: finish())

    def _write(self, step: int, write: Callable[[], None]) -> None:
        with self._plain_errors(step):
            write()
        if not is_first_process():
            return
        steps = list_steps(self._folder)
        old = [each for each in steps if each <= step][: -self._keep]
        # Later steps belong to an abandoned course, but only damaged ones are removed.
        damaged = [each for each in steps if each > step and each in self._damaged]
        remove_steps(self._folder, [*old, *damaged])

    @contextlib.contextmanager
    def _plain_errors(self, step: int) -> Iterator[None]:
        """Raises OSError with a remedy for what keeps a step from being written."""
        try:
            yield
        except DamagedStep as error:
            raise OSError(
                f"the checkpoint of step {step} was not written: {error}. Lower the learning rate "
                "and resume from the last checkpoint."
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OSError(
                f"the checkpoint of step {step} cannot be written to {self._folder} ({reason}): "
                "make room, or check the folder; the same command resumes from the last one."
            ) from error


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two parts of a checkpoint: what a model needs, and what training needs besides."""
    weights: dict[str, Any] = {"trainable": state.trainable}
    if state.share is not None:
        weights["share"] = state.share
    key = jax.random.key_data(state.key)
    return weights, {"opt_state": state.opt_state, "step": state.step, "key": key}


def _check_fits(saved: Any, target: Any) -> None:
    """Compares names and shapes before anything is read: orbax would stop half-way."""
    found, expected = flat_shapes(saved), flat_shapes(target)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointMisfit(
                f"`{name}` must have shape {expected.get(name)}, the checkpoint has "
                f"{found.get(name)}: use another --output."
            )


def _check_finite(tree: Any) -> None:
    """Raises DamagedStep if a floating-point array holds NaN or infinity."""
    for path, value in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(value.dtype, jnp.floating) and not _is_finite(value):
            raise DamagedStep(f"values of {jax.tree_util.keystr(path)} are not finite")


def _is_finite(value: Any) -> bool:
    if getattr(value, "is_fully_addressable", True):
        return bool(np.isfinite(np.asarray(value)).all())
    return bool(jnp.isfinite(value).all())  # computed by all processes together


def _folder(path: str | os.PathLike[str]) -> Path:
    return Path(path).resolve() / "checkpoints"
