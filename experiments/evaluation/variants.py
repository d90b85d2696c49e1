"""Variants of one model: full softmax, its window alone, a wider window, and the memory on."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp

from convert.bases import has_base
from convert.sources import DEFAULT_MODEL
from experiments.models import Loaded, load_model
from tptt_jax import LizaConfig, ModelConfig, state_bytes
from tptt_jax.config import runs_memory
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.training.description import DESCRIPTION, is_checkpoint
from tptt_jax.training.step_folders import checkpoint_folder

Column = Literal["full softmax", "window alone", "window of equal bytes", "memory on"]
COLUMNS: tuple[Column, ...] = get_args(Column)
FULL, ALONE, EQUAL, MEMORY = COLUMNS


@dataclass(frozen=True)
class Variant:
    """A way of running a model."""

    name: Column
    window: int | None
    """Tokens that softmax attention sees; None: all, or the base model's own windows."""
    use_memory: bool


@dataclass(frozen=True)
class Source:
    """A model given by `--models`, or by `--model` and `--adapter`."""

    model: str | None
    adapter: Path | None = None
    context: int | None = None
    """Tokens that rotary frequencies are fixed for, if they depend on the length."""
    base_dtype: BaseDtype | None = None
    """Of the base model's matrices if they are quantised."""

    @classmethod
    def named(
        cls, name: str, context: int | None = None, base_dtype: BaseDtype | None = None
    ) -> "Source":
        """A run of finetune or an adapter's directory, or else a base model."""
        path = Path(name).expanduser()
        if is_checkpoint(path) or has_base(path):
            return cls(None, path, context, base_dtype)
        return cls(name, None, context, base_dtype)

    @property
    def label(self) -> str:
        """The name in reports."""
        return str(self.adapter or self.model or DEFAULT_MODEL)

    @property
    def run(self) -> Path | None:
        """The output directory of finetune; None: the source is none."""
        path = self._path
        return path if path is not None and is_checkpoint(path) else None

    @property
    def _path(self) -> Path | None:
        name = self.adapter or self.model
        return None if name is None else Path(name).expanduser()

    @functools.cached_property
    def stamp(self) -> str:
        """A stamp that changes when the model is rewritten, so that old results are not reused."""
        path = self._path
        if path is None or not path.exists():
            return ""
        # Not reports, exports or evaluations that were written into the model's folder.
        if self.run is not None:
            files = [path / DESCRIPTION, *checkpoint_folder(path).rglob("*")]
        else:
            files = [path] if path.is_file() else [*path.iterdir()]
        return str(max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0))

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on beside the name of the model, as far as it is given."""
        base = None if self.adapter is None else self.model
        given = {"base": base, "context": self.context, "base_dtype": self.base_dtype}
        return {name: value for name, value in given.items() if value is not None}

    def load(
        self, window: int | None, sinks: int | None, dtype: jnp.dtype, *, is_full: bool = False
    ) -> Loaded:
        """Loads the model with a window.

        Args:
          window: in tokens; None: as it was trained, or no window with `is_full`.
          sinks: None: as it was trained.
          dtype: of the weights.
          is_full: whether to remove its window.
        """
        return load_model(
            self.model,
            self.adapter,
            window=window,
            sinks=sinks,
            is_full=is_full,
            context=self.context,
            dtype=dtype,
            base_dtype=self.base_dtype,
        )


def variants_of(config: ModelConfig, liza: LizaConfig | None, dtype: jnp.dtype) -> list[Variant]:
    """The variants of a model, the simplest first.

    Args:
      config: of the base model.
      liza: its memory and window; None: a base model.
      dtype: of keys and values in the cache, which determines the window of equal bytes.
    """
    if liza is None:
        return [Variant(FULL, None, use_memory=False)]
    has_memory = runs_memory(config, liza)
    on = [Variant(MEMORY, liza.softmax_window, use_memory=True)] if has_memory else []
    if not liza.softmax:
        return on
    window = liza.softmax_window
    found = [Variant(FULL, None, use_memory=False)]
    if window is None:
        return found + on
    found.append(Variant(ALONE, window, use_memory=False))
    if has_memory:
        wider = equal_window(config, liza, dtype)
        if wider is not None:
            found.append(Variant(EQUAL, wider, use_memory=False))
    return found + on


def equal_window(config: ModelConfig, liza: LizaConfig, dtype: jnp.dtype) -> int | None:
    """The narrowest window whose cache takes at least the bytes of a window and its memory.

    Layers that keep full attention keep it, so theirs are the same bytes on both sides. None: the
    base model windows every layer itself, so no setting widens one.
    """
    assert liza.softmax_window is not None
    if "full" not in config.layer_kinds:
        return None

    def size(setting: LizaConfig) -> int:
        return state_bytes(config, setting, batch_size=1, max_tokens=0, dtype=dtype)

    kept = {name: getattr(liza, name) for name in ("softmax_sinks", "full_layers")}

    def alone(window: int) -> LizaConfig:
        return LizaConfig(writes="none", softmax_window=window, **kept)

    goal, low = size(liza), liza.softmax_window
    high = 2 * low
    while size(alone(high)) < goal:
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if size(alone(middle)) < goal else (low, middle)
    return high if size(alone(low)) < goal else low
