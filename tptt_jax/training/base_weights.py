"""Fingerprints of base weights: whether a run's base is still what it was trained on."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx

from tptt_jax.layers.parameters import AdapterParam, BaseParam
from tptt_jax.model import CausalLM
from tptt_jax.processes import fetch
from tptt_jax.training.description import Description
from tptt_jax.training.partition import dotted

RECORD = "run.json"
"""Name of the file in a run's directory that holds the fingerprints."""
# Training changes nearly all values; this many samples of each tensor show it.
_SAMPLES = 4096


def hash_weights(model: CausalLM, *, adapters: bool) -> dict[str, str]:
    """Shapes and hashes of sampled values of the loaded tensors, by dotted path.

    Args:
      model: as loaded.
      adapters: whether its adapters are loaded too; else they are new.
    """
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        kinds = (BaseParam, AdapterParam) if adapters else BaseParam
        if isinstance(variable, kinds):
            value = variable.get_value()
            is_here = value.is_fully_addressable
            if is_here and next(iter(value.devices())).platform == "cpu":
                value = np.asarray(value)  # no copy, and no compilation for each shape
            flat = value.reshape(-1)
            # From an accelerator, only the samples are copied to the host.
            some = flat[:: max(1, flat.size // _SAMPLES)]
            some = np.ascontiguousarray(some if isinstance(some, np.ndarray) else fetch(some))
            content = hashlib.sha256(some.view(np.uint8).data).hexdigest()[:16]
            found[dotted(path)] = f"{list(value.shape)} {content}"
    return found


@contextlib.contextmanager
def same_base_weights(run: Path, model: CausalLM, described: Description) -> Iterator[None]:
    """Refuses a base that has changed since a run began; runs without a record pass.

    The trained values are restored within the context: what they replace may have changed.

    Args:
      run: its directory.
      model: the base model.
      described: the run; weights loaded in another dtype are not compared.

    Raises:
      ValueError: if values or shapes differ.
    """
    dtypes = (np.dtype(model.dtype).name, model.base_dtype)
    is_alike = dtypes == (described.dtype, described.base_dtype)
    expected = _recorded(run / RECORD) if is_alike else {}
    adapters = any(".lora." in name for name in expected)
    found = hash_weights(model, adapters=adapters) if expected else {}
    changed = [name for name in found if found[name] != expected.get(name, found[name])]
    yield
    if not changed:
        return
    restored = hash_weights(model, adapters=adapters)
    if kept := [name for name in changed if restored[name] == found[name]]:
        raise ValueError(
            f"{len(kept)} tensors of {described.source} are not those that {run} was trained on, "
            f"first {kept[0]}: restore the base model, or remove {run / RECORD} to use it as it is."
        )


def _recorded(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # damaged: finetune refuses it
    return base if isinstance(base, dict) else {}
