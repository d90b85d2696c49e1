"""Keeping what was read: a state as a file, bound to the model that read it."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tptt_jax.inference.prefill import check_state
from tptt_jax.inference.state import ReadState, init_state
from tptt_jax.model import CausalLM

_FORMAT = "tptt_jax read state 1"


def model_fingerprint(model: CausalLM) -> str:
    """SHA-256 of everything that decides what a model computes.

    That is the values, shapes and dtypes of all weights, adapters and shares, and the
    configurations. It reads a gigabyte in about a second.

    Args:
      model: any model; its weights may be sharded.

    Returns:
      64 hexadecimal digits, the same in every process and on every device.
    """
    variables = nnx.to_flat_state(nnx.state(model))
    named = sorted((".".join(map(str, path)), variable) for path, variable in variables)

    def digest(item: tuple[str, Any]) -> str:
        name, variable = item
        value = np.ascontiguousarray(variable.get_value())
        # hashlib lets other threads run while it works.
        content = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        return f"{name} {value.dtype} {value.shape} {content}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = list(pool.map(digest, named))
    configs = [
        None if config is None else dataclasses.asdict(config)
        for config in (model.config, model.liza, model.lora)
    ]
    if configs[1] is not None:
        _drop_later_options(configs[1])
    lines.append(json.dumps([*configs, str(jnp.dtype(model.dtype))], sort_keys=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _drop_later_options(liza: dict[str, Any]) -> None:
    """States from before there was a choice are as good as those that name it."""
    if liza["precision"] in ("auto", "highest"):
        del liza["precision"]
    if liza["writes"] == "all":
        del liza["writes"]


def save_state(path: str | os.PathLike[str], model: CausalLM, state: ReadState) -> None:
    """Writes a state; the file appears under its name only when it is complete.

    Args:
      path: a safetensors file; an earlier one is replaced.
      model: that read the state.
      state: from `read` or `generate`.

    Raises:
      OSError: if the file cannot be written.
    """
    target = Path(path)
    metadata = {"format": _FORMAT, "model": model_fingerprint(model)}
    arrays = {name: _to_bits(np.asarray(leaf)) for name, leaf in _named_leaves(state)}
    with _replacing(target) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def load_state(path: str | os.PathLike[str], model: CausalLM) -> ReadState:
    """Reads a state that the same model has left, here or elsewhere.

    Args:
      path: a file from `save_state`.
      model: with the same weights and configuration.

    Returns:
      The state, on the default device.

    Raises:
      ValueError: if the file is no complete state, or another model has read it.
      OSError: if the file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file that save_state has written.")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if metadata.get("format") != _FORMAT:
                raise ValueError(f'its "format" is not {_FORMAT!r}')
            if metadata.get("model") != model_fingerprint(model):
                raise ValueError(
                    "another model has read it: load the weights, adapter, dtype, memory and "
                    "window it was saved with"
                )
            arrays = {name: file.get_tensor(name) for name in names}
        return _rebuild(arrays, model)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be continued from ({error}); or read the document again."
        ) from None


def _rebuild(arrays: dict[str, np.ndarray], model: CausalLM) -> ReadState:
    """Puts arrays where an empty state of the same sizes has them, and checks every shape."""
    rows = int(arrays["hidden"].shape[0])
    use_memory = any("memory" in name for name in arrays)
    wanted = jax.eval_shape(lambda: init_state(model, rows, use_memory=use_memory))
    leaves = []
    for name, leaf in _named_leaves(wanted):
        value = arrays.pop(name)
        # Caches without a window have as many slots as they have grown to.
        shape = leaf.shape
        if name.endswith((".keys", ".values")) and len(shape) == 5 and "softmax" in name:
            shape = (*shape[:2], value.shape[2], *shape[3:])
        if value.shape != shape or value.dtype != _bits_dtype(leaf.dtype):
            raise ValueError(f"{name} is {value.dtype} {value.shape}, wanted is {shape}")
        leaves.append(jax.device_put(value.view(leaf.dtype)))
    if arrays:
        raise ValueError(f"it holds {sorted(arrays)[0]}, which this model has no use for")
    state = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    check_state(model, state, rows, use_memory=use_memory)
    return state


def _named_leaves(state: ReadState) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    ]


def _bits_dtype(dtype: Any) -> np.dtype:
    """What an array is stored as: safetensors knows no bfloat16 in numpy."""
    dtype = np.dtype(dtype)
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype


def _to_bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(_bits_dtype(array.dtype))


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside `target` that takes its place once it is written and on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
