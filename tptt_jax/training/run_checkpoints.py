"""Checkpoints of the whole state of a run, written in the background."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from tptt_jax.processes import failing_together, from_first, is_first_process, wait_for_all
from tptt_jax.training.checkpoint_contents import (
    check_finite,
    check_fits,
    checkpoint_parts,
    restored_state,
)
from tptt_jax.training.newest_step import NewestStep, read_newest
from tptt_jax.training.orbax_files import PARTS, read_shapes, read_trees, start_trees, write_trees
from tptt_jax.training.step_folders import (
    DamagedStep,
    checkpoint_folder,
    fill_step,
    last_step,
    list_steps,
    remove_leftovers,
    remove_steps,
    start_step,
    write_step,
)
from tptt_jax.training.train_step import TrainState

_LOG = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves and resumes the whole state of a run; use as a context manager.

    Leaving the context waits for the pending write.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        """Opens `path`/checkpoints; the last `keep` steps are kept.

        Raises:
          OSError: if the folder cannot be made.
        """
        self._folder = checkpoint_folder(path)
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
        return last_step(self._folder)

    def save(self, state: TrainState) -> None:
        """Starts writing a state under its step; returns once its arrays are copied.

        Raises:
          OSError: if the previous write failed.
        """
        self.wait()
        step = int(state.step)
        if step == self._known:
            return
        trees: dict[str, Any] = dict(zip(PARTS, checkpoint_parts(state), strict=True))
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
        parts = dict(zip(PARTS, checkpoint_parts(like), strict=True))
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, parts)

        def read(folder: Path) -> Any:
            for name, target in parts.items():
                check_fits(read_shapes(folder, name), target)
            values = read_trees(folder, targets)
            check_finite(values["weights"])
            return values

        if self.latest_step is None:
            raise ValueError(
                "there is no complete checkpoint to resume from: train from the start."
            )
        newest = self._read_newest(read, sound)
        self._known, self._damaged = newest.step, newest.damaged
        return restored_state(newest.content)

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
                check_finite(copies["weights"])
                write_step(self._folder, step, lambda place: write_trees(place, copies))

            return write
        check_finite(trees["weights"])
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
