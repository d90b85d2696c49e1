"""States as files, bound to the model that read them."""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tptt_jax.config import RopeConfig, flat_settings
from tptt_jax.decoder import DecodingState
from tptt_jax.durable import atomic_file
from tptt_jax.inference.state_checks import check_state
from tptt_jax.model import CausalLM, init_cache

_FORMAT = "tptt_jax read state 1"
_SHOWN = 3


def model_fingerprint(model: CausalLM) -> str:
    """SHA-256 of everything that determines what a model computes.

    It covers the values, shapes and dtypes of all weights, adapters and shares, and the
    configurations, and reads a gigabyte in about a second.

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
    configs = list(_settings(model).values())
    assert configs[0] is not None
    for name in ("rope", "sliding_rope"):
        _drop_later_scalings(configs[0][name])
    if configs[1] is not None:
        _drop_later_options(configs[1])
    lines.append(json.dumps([*configs, str(jnp.dtype(model.dtype))], sort_keys=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _settings(model: CausalLM) -> dict[str, dict[str, Any] | None]:
    """The configurations as JSON values, under the names that files have."""
    return {
        name: None if config is None else flat_settings(config)
        for name, config in (("model", model.config), ("liza", model.liza), ("lora", model.lora))
    }


def _drop_later_options(liza: dict[str, Any]) -> None:
    """Drops later options at their defaults, so that older states stay valid."""
    if liza.get("precision") in ("auto", "highest"):
        del liza["precision"]
    if liza.get("writes") == "all":
        del liza["writes"]
    if not liza.get("full_layers", True):
        del liza["full_layers"]
    if liza.get("horizon", 0) is None:
        del liza["horizon"]


# Fields of a rotary embedding when the first states were saved.
_FIRST_ROPE = (
    *("theta", "scaling", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_positions",
)


def _drop_later_scalings(rope: dict[str, Any] | None) -> None:
    """Drops settings of later scalings unless they are set."""
    if rope is None:
        return
    for name, plain in dataclasses.asdict(RopeConfig()).items():
        # JSON has lists instead of tuples.
        plains = (plain, list(plain)) if isinstance(plain, tuple) else (plain,)
        if name not in _FIRST_ROPE and name in rope and rope[name] in plains:
            del rope[name]


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
        "model": model_fingerprint(model),
        "settings": json.dumps(_flat_settings(model)),
        "checksum": _checksum(arrays),
    }
    try:
        with atomic_file(target) as temporary:
            save_file(arrays, temporary, metadata=metadata)
    except SafetensorError as error:
        # safetensors raises its own exception for a full disk.
        raise OSError(f"{path} cannot be written: {error}") from None


def _flat_settings(model: CausalLM) -> dict[str, Any]:
    """Every setting by its name, for errors that name the difference."""
    flat: dict[str, Any] = {"dtype": str(jnp.dtype(model.dtype))}
    for name, config in _settings(model).items():
        flat |= {f"{name}.{key}": value for key, value in (config or {name: None}).items()}
    return json.loads(json.dumps(flat))


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
            if metadata.get("format") != _FORMAT:
                raise ValueError(f'its "format" is not {_FORMAT!r}')
            if metadata.get("model") != model_fingerprint(model):
                raise ValueError(_describe_difference(metadata, model))
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


def _describe_difference(metadata: dict[str, str], model: CausalLM) -> str:
    """The settings that differ between the state's model and this one."""
    try:
        saved = json.loads(metadata.get("settings", "{}"))
    except (ValueError, RecursionError):
        saved = {}
    saved = _counted(saved) if isinstance(saved, dict) else {}
    ours = _counted(_flat_settings(model)) if saved else {}
    names = dict.fromkeys([*saved, *ours])
    changed = [name for name in names if saved.get(name) != ours.get(name)]
    if not changed:
        return (
            "another model has read it: load the weights, adapter, dtype, memory and window it was "
            "saved with"
        )
    shown = [_difference(name, saved.get(name), ours.get(name)) for name in changed[:_SHOWN]]
    more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"another model has read it: {'; '.join(shown)}{more}"


def _difference(name: str, saved: Any, own: Any) -> str:
    before, now = ("none" if x is None else f"{x!s:.40}" for x in (saved, own))
    if before == now:
        return f"{name}: other values in the state than in the model"
    return f"{name}: {before} in the state, {now} in the model"


def _counted(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in the fingerprint, by dotted name."""
    configs: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        config, _, field = name.partition(".")
        configs.setdefault(config, {})[field] = value
    _drop_later_options(configs.get("liza", {}))
    for name in ("rope", "sliding_rope"):
        rope = configs.get("model", {}).get(name)
        _drop_later_scalings(rope if isinstance(rope, dict) else None)
    return _flatten(configs)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}".strip(".")
        flat |= _flatten(value, name) if isinstance(value, dict) else {name: value}
    return flat


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
