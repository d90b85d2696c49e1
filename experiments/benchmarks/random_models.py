"""The model of a benchmark: loaded, or a named shape with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import tyro
from flax import nnx

from convert import load_pretrained
from convert.sources import DEFAULT_MODEL
from experiments.benchmarks.timing import check_positive
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig, warm_up
from tptt_jax.config import Writes

Shape = Literal["tiny", "smollm2-135m", "gemma3-270m", "llama3.2-1b"]
SHAPES: dict[Shape, Callable[[], ModelConfig]] = {
    "tiny": ModelConfig.tiny,
    "smollm2-135m": ModelConfig.smollm2_135m,
    "gemma3-270m": ModelConfig.gemma3_270m,
    "llama3.2-1b": ModelConfig.llama3_2_1b,
}


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The model to run, and its options."""

    model: str | None = None
    """A model as `load_pretrained` takes it; None: "smollm2-135m", or random weights."""
    random_weights: Shape | None = None
    """Random weights of this shape instead of a model: no download, and the same speed."""
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leaves the memory out; a window stays."""
    writes: Writes = "evicted"
    """Which tokens the memory holds: those that leave the window, or "all" beside full softmax."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base weights."""

    def __post_init__(self) -> None:
        """Rejects two models at once; the demo is the default."""
        check_positive(self)
        if self.random_weights is None:
            object.__setattr__(self, "model", self.model or DEFAULT_MODEL)
        elif self.model is not None:
            raise ValueError(
                f"give a model ({self.model}) or random_weights ({self.random_weights}), not both."
            )

    @property
    def name(self) -> str:
        """The name for titles."""
        return self.model or f"{self.random_weights}, random weights"

    def memory(self, window: int | None) -> LizaConfig | None:
        """The default memory, a window alone, or neither.

        Args:
          window: tokens that softmax attention sees; None: all.
        """
        if not self.no_liza:
            return LizaConfig(writes=self.writes, softmax_window=window)
        return None if window is None else LizaConfig(writes="none", softmax_window=window)

    def load(self, liza: LizaConfig | None, lora: LoraConfig | None = None) -> CausalLM:
        """Builds the model with this memory and these adapters; random weights have `dtype`."""
        dtype = jnp.dtype(self.dtype)
        if self.model is not None:
            model = load_pretrained(self.model, liza, lora, dtype)
        else:
            assert self.random_weights is not None
            config = SHAPES[self.random_weights]()
            model = CausalLM(config, liza, lora, dtype=dtype, rngs=nnx.Rngs(0))
        warm_up(model)
        return model
