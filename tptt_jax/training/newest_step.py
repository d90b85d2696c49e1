"""Reads the newest undamaged checkpoint: damaged ones are skipped, temporary failures are not."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from tptt_jax.error_text import first_line
from tptt_jax.training.step_folders import (
    DamagedStep,
    check_step,
    has_manifest,
    is_lost,
    list_steps,
)

_LOG = logging.getLogger(__name__)
_Read = TypeVar("_Read")


class CheckpointMisfit(ValueError):
    """A readable checkpoint of another model."""


class NewestStep(NamedTuple, Generic[_Read]):
    """The step that was read, and the skipped ones."""

    step: int
    content: _Read
    damaged: tuple[int, ...]
    """Later steps that are certainly damaged, newest first."""


def read_newest(
    folder: Path,
    parts: tuple[str, ...],
    read: Callable[[Path], _Read],
    *,
    sound: int | None = None,
) -> NewestStep[_Read]:
    """Reads the newest undamaged step; a warning in the log names the skipped ones.

    Args:
      folder: holds the steps.
      parts: names of the subfolders that are needed.
      read: reads the folder of a step; raises DamagedStep for values that cannot be right.
      sound: a step whose files this process has compared already; hashing gigabytes takes seconds.

    Raises:
      CheckpointMisfit: from `read`.
      ValueError: if all steps are damaged.
      OSError: if an undamaged step cannot be read now. An older one is not used then: the run would
        lose its later steps.
    """
    passed: dict[int, str] = {}
    damaged: list[int] = []
    # Listed again each time: an active run may remove a step during the read.
    while remaining := [step for step in list_steps(folder) if step not in passed]:
        step, is_checked = remaining[-1], False
        try:
            if step != sound:
                check_step(folder / str(step), parts)
            is_checked = has_manifest(folder / str(step))
            found = read(folder / str(step))
        except (CheckpointMisfit, MemoryError):
            raise
        except DamagedStep as error:
            passed[step] = str(error)
            damaged.append(step)
            continue
        # orbax passes on exceptions of asyncio, tensorstore, json and the system.
        except Exception as error:
            if not (folder / str(step)).exists():
                passed[step] = "it was removed"
                continue
            if is_checked or (isinstance(error, OSError) and not is_lost(error)):
                state = "is intact but" if is_checked else "is there but"
                raise OSError(
                    f"checkpoint {step} in {folder} {state} could not be read "
                    f"({first_line(error, 200)}): free memory or check permissions, then run the "
                    "same command again."
                ) from error
            # Without a manifest, damage and failure look alike.
            passed[step] = first_line(error, 200)
            continue
        _warn(folder, passed, step)
        return NewestStep(step, found, tuple(damaged))
    reasons = "; ".join(f"step {number}: {reason}" for number, reason in passed.items())
    raise ValueError(
        f"no checkpoint in {folder} can be read ({reasons}): restore its files from a copy, or "
        "train again in another --output."
    )


def _warn(folder: Path, passed: dict[int, str], taken: int) -> None:
    for number, reason in passed.items():
        if (folder / str(number)).exists():
            _LOG.warning(
                "checkpoint %d in %s cannot be read (%s): taking that of step %d",
                number,
                folder,
                reason,
                taken,
            )
