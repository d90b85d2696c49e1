"""States as files, bound to the model that read them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tptt_jax.decoder import DecodingState
from tptt_jax.durable import atomic_file
from tptt_jax.inference.binding import (
    describe_difference,
    first_fingerprint,
    hash_weights,
    model_settings,
    parse_first_settings,
    parse_settings,
)
from tptt_jax.inference.state_checks import check_state
from tptt_jax.model import CausalLM, init_cache

_FORMAT = "tptt_jax read state 2"
# One hash of weights and settings.
_FIRST_FORMAT = "tptt_jax read state 1"


def save_state(path: str | os.PathLike[str], model: CausalLM, state: DecodingState) -> None:
    """Writes a state; the file appears under its name only when it is complete.

    Args:
      path: a safetensors file; an earlier one is replaced.
      model: that read the state.
      state: from `read` or `generate`.

    Raises:
      OSError: if the file cannot be written.
    """
    target = Path(path)
    arrays = {name: _to_bits(np.asarray(leaf)) for name, leaf in _named_leaves(state)}
    metadata = {
        "format": _FORMAT,
        "weights": hash_weights(model),
        "settings": json.dumps(model_settings(model)),
        "checksum": _checksum(arrays),
    }
    try:
        with atomic_file(target) as temporary:
            save_file(arrays, temporary, metadata=metadata)
    except SafetensorError as error:
        # safetensors raises its own exception for a full disk.
        raise OSError(f"{path} cannot be written: {error}") from None


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes, dtypes and contents."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {value.dtype} {value.shape} ".encode())
        total.update(value.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def load_state(path: str | os.PathLike[str], model: CausalLM) -> DecodingState:
    """Reads a state that the same model saved, here or elsewhere.

    Args:
      path: a file from `save_state`.
      model: with the same weights and configuration.

    Returns:
      The state, on the default device.

    Raises:
      ValueError: if the file is not a complete state, or belongs to another model.
      OSError: if the file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}; give a file that save_state has written.")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            _check_model(metadata, model)
            arrays = {name: file.get_tensor(name) for name in names}
        # Older files have no checksum.
        checksum = metadata.get("checksum")
        if checksum is not None and checksum != _checksum(arrays):
            raise ValueError("its content has changed since it was saved: copy it again")
        return _rebuild(arrays, model)
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        reason = str(error).removesuffix(".").removesuffix(": read the document again")
        raise ValueError(
            f"{path} cannot be continued from ({reason}); or read the document again."
        ) from None


def _check_model(metadata: dict[str, str], model: CausalLM) -> None:
    """Raises ValueError if a file is no state, or another model has read it."""
    version, text = metadata.get("format"), metadata.get("settings")
    if version == _FORMAT:
        settings = parse_settings(text)
    elif version == _FIRST_FORMAT:
        if metadata.get("model") == first_fingerprint(model):
            return
        settings = parse_first_settings(text)
    else:
        raise ValueError(f'its "format" is not {_FORMAT!r}')
    if settings is None:
        raise ValueError(
            "another model has read it: its settings are not known, so load the weights, adapter, "
            "dtype, memory and window it was saved with"
        )
    difference = describe_difference(settings, model)
    # Weights take a second a gigabyte to hash: only where the settings agree.
    if difference is None and (
        version == _FIRST_FORMAT or metadata.get("weights") != hash_weights(model)
    ):
        difference = "the settings agree, but weights or adapters have other values"
    if difference is not None:
        raise ValueError(f"another model has read it: {difference}")


def _rebuild(arrays: dict[str, np.ndarray], model: CausalLM) -> DecodingState:
    """Builds a state from arrays, and checks each against an empty state."""
    if "hidden" not in arrays:
        raise ValueError("it lacks hidden")
    if arrays["hidden"].ndim != 2:
        raise ValueError(f"hidden must be [B, E], got shape {arrays['hidden'].shape}")
    rows = len(arrays["hidden"])
    use_memory = any("memory" in name for name in arrays)
    empty = jax.eval_shape(lambda: init_cache(model, rows, use_memory=use_memory, growable=True))
    leaves = []
    for name, leaf in _named_leaves(empty):
        if name not in arrays:
            raise ValueError(f"it lacks {name}")
        value = arrays.pop(name)
        # Slots of rings are checked later, as they depend on the window or the text.
        is_ring = "softmax" in name and value.ndim == len(leaf.shape)
        shape = (*leaf.shape[:2], value.shape[2], *leaf.shape[3:]) if is_ring else leaf.shape
        if value.shape != shape or value.dtype != _bits_dtype(leaf.dtype):
            raise ValueError(f"{name} is {value.dtype} {value.shape}, expected {shape}")
        leaves.append(_checked(name, value, leaf.dtype))
    if arrays:
        raise ValueError(f"it holds {sorted(arrays)[0]}, which this model does not have")
    state = jax.tree.unflatten(jax.tree.structure(empty), leaves)
    check_state(model, state, rows, use_memory=use_memory)
    return jax.device_put(state)


def _checked(name: str, value: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in the model's dtype; refuses impossible values."""
    if jnp.issubdtype(dtype, jnp.bool_) and value.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"{name} holds bytes that are neither true nor false")
    value = value.view(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and not np.isfinite(value).all():
        raise ValueError(f"{name} holds values that are not finite")
    return value


def _named_leaves(state: DecodingState) -> list[tuple[str, Any]]:
    """The arrays under their names in the file."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    ]
    # The format is older than `DecodingState`: stacks and lengths were a part named cache.
    return [(name if name in ("hidden", "seen") else f"cache.{name}", leaf) for name, leaf in named]


def _bits_dtype(dtype: Any) -> np.dtype:
    """The stored dtype of an array: safetensors has no bfloat16 for NumPy."""
    dtype = np.dtype(dtype)
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype


def _to_bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(_bits_dtype(array.dtype))
