"""The arrays of a checkpoint: its two parts, and checks of what is written and read."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.training.newest_step import CheckpointMisfit
from tptt_jax.training.orbax_files import flat_shapes
from tptt_jax.training.step_folders import DamagedStep
from tptt_jax.training.train_step import TrainState


def checkpoint_parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two `PARTS`: what a model needs, and what training needs besides."""
    weights: dict[str, Any] = {"trainable": state.trainable}
    if state.share is not None:
        weights["share"] = state.share
    key = jax.random.key_data(state.key)
    return weights, {"opt_state": state.opt_state, "step": state.step, "key": key}


def restored_state(saved: Mapping[str, Any]) -> TrainState:
    """The state whose parts were read under the names in `PARTS`."""
    weights, progress = saved["weights"], saved["progress"]
    return TrainState(
        trainable=weights["trainable"],
        opt_state=progress["opt_state"],
        share=weights.get("share"),
        step=progress["step"],
        key=jax.random.wrap_key_data(progress["key"]),
    )


def check_fits(saved: Any, target: Any) -> None:
    """Compares names and shapes before anything is read: orbax would stop half-way."""
    found, expected = flat_shapes(saved), flat_shapes(target)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointMisfit(
                f"`{name}` must have shape {expected.get(name)}, the checkpoint has "
                f"{found.get(name)}: use another --output."
            )


def check_finite(tree: Any) -> None:
    """Raises DamagedStep if a floating-point array holds NaN or infinity."""
    for path, value in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(value.dtype, jnp.floating) and not _is_finite(value):
            raise DamagedStep(f"values of {jax.tree_util.keystr(path)} are not finite")


def _is_finite(value: Any) -> bool:
    if getattr(value, "is_fully_addressable", True):
        return bool(np.isfinite(np.asarray(value)).all())
    return bool(jnp.isfinite(value).all())  # computed by all processes together
