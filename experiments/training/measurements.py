"""What a run measures on held-out text, and its file `evaluation.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from convert.errors import ConversionError
from convert.formats.files import read_json
from experiments.training.evaluation import HeldOut
from experiments.training.questions import Answers
from tptt_jax.durable import atomic_file

State = Literal["before", "window", "fitted", "after", "memory_off"]

LABELS: dict[State, str] = {
    "before": "base model, full softmax attention",
    "window": "base model, the window alone",
    "fitted": "window and memory, fitted",
    "after": "after training",
    "memory_off": "after training, memory switched off",
}


class Measured(NamedTuple):
    """What was measured in one state of the model; no answers: it was not asked."""

    held_out: HeldOut
    answers: Answers | None


def read_measurements(file: Path) -> dict[State, Measured]:
    """The measurements of earlier calls.

    Raises:
      ValueError: if the file is damaged.
    """
    try:
        saved = read_json(file)
    except ConversionError as error:
        raise ValueError(f"{error} Remove it to measure again.") from None
    try:
        found: dict[State, Measured] = {
            name: _from_json(saved[name]) for name in LABELS if name in saved
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it to measure again.") from None
    return found


def write_measurements(file: Path, found: Mapping[State, Measured]) -> None:
    """Replaces the file at once."""
    with atomic_file(file) as path:
        saved = {name: _to_json(part) for name, part in found.items()}
        path.write_text(json.dumps(saved), encoding="utf-8")


def _to_json(measured: Measured) -> dict[str, Any]:
    held_out, answers = measured
    part: dict[str, Any] = {"nats": held_out.nats.tolist(), "counts": held_out.counts.tolist()}
    return part if answers is None else part | {"answers": answers._asdict()}


def _from_json(part: dict[str, Any]) -> Measured:
    held_out = HeldOut(*(np.array(part[name], np.float64) for name in ("nats", "counts")))
    if held_out.nats.ndim != 1 or held_out.nats.shape != held_out.counts.shape:
        raise ValueError(f"nats {held_out.nats.shape}, counts {held_out.counts.shape}")
    answers = part.get("answers")
    return Measured(held_out, None if answers is None else Answers(**answers))
