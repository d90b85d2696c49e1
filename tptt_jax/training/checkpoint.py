"""Checkpoints: what was trained, never the frozen base, written so that a kill loses nothing.

A run's directory holds `checkpoint.json` (what to load the base from, and how) and
`checkpoints/<step>/` (orbax; a step appears under its name only once it is complete).
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import jax
import orbax.checkpoint as ocp

from tptt_jax.config import LizaConfig, LoraConfig
from tptt_jax.model import CausalLM
from tptt_jax.training.partition import TrainMode, load_trainable, restore_targets
from tptt_jax.training.train_step import TrainState

_DESCRIPTION = "checkpoint.json"
_FORMAT = "tptt_jax checkpoint 1"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint needs besides its arrays."""

    source: str
    """Where the base model comes from, as given to `load_pretrained`."""
    liza: LizaConfig | None
    lora: LoraConfig | None
    train: TrainMode
    dtype: str = "float32"

    def to_json(self) -> str:
        """One indented JSON object."""
        values = dataclasses.asdict(self)
        return json.dumps({"format": _FORMAT} | values, indent=2) + "\n"


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a run's directory with a description in it."""
    return (Path(path) / _DESCRIPTION).is_file()


def write_description(path: str | os.PathLike[str], description: Description) -> None:
    """Writes `checkpoint.json` into the directory, which is made if it is missing."""
    target = Path(path) / _DESCRIPTION
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".json.tmp")
    beside.write_text(description.to_json())
    beside.replace(target)


def read_description(path: str | os.PathLike[str]) -> Description:
    """Reads `checkpoint.json`.

    Raises:
      ValueError: if there is none, or it is not one of ours.
    """
    target = Path(path) / _DESCRIPTION
    if not target.is_file():
        raise ValueError(
            f"{path} has no {_DESCRIPTION}: point to the --output directory of a finetune run."
        )
    try:
        values = json.loads(target.read_text())
        if values.pop("format", None) != _FORMAT:
            raise ValueError(f'its "format" is not {_FORMAT!r}')
        for name, kind in (("liza", LizaConfig), ("lora", LoraConfig)):
            if values[name] is not None:
                _check_types(kind, values[name])
                values[name] = kind(**values[name])
        _check_types(Description, values)
        return Description(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{target} is not the description of a checkpoint ({error}): point to the "
            "--output directory of a finetune run."
        ) from None


def _check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raises ValueError where JSON holds another type than the dataclass declares."""
    for name, hint in get_type_hints(kind).items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(f"{name} cannot be {values[name]!r:.100}")


def _fits(value: Any, hint: Any) -> bool:
    kind, options = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value is not True and value == option for option in options)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, options[0]) for each in value)
    if options:
        return any(_fits(value, each) for each in options)
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


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
