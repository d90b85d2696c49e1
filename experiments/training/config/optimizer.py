"""The options of the optimizer."""

from dataclasses import dataclass
from typing import Literal

from experiments.data.config import check_literals
from tptt_jax.config import LizaConfig
from tptt_jax.training import optimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and the schedule of its learning rates."""

    learning_rate: float = 1e-3
    """Peak learning rate of adapters or weights."""
    mag_learning_rate: float | None = None
    """Peak learning rate of the memory's share. None: learning_rate for mass gates, 100 times that
    for single logits (--liza.mag learned), which need larger steps."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of both rates after the warm-up, to a tenth."""
    warmup_steps: int = 2
    """Steps over which both rates rise."""
    warmup_ratio: float | None = None
    """Share of all steps over which both rates rise, 0 to 1; None: warmup_steps."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices."""
    grad_clip: float = 1.0
    """Maximum global norm of the gradients."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        check_literals(self)
        self._with_rate_of_share(1.0)

    def for_memory(self, liza: LizaConfig) -> optimizer.OptimizerConfig:
        """The optimizer for a model with this memory, whose share may need larger steps."""
        return self._with_rate_of_share(1.0 if liza.mag == "mass" else 100.0)

    def _with_rate_of_share(self, factor: float) -> optimizer.OptimizerConfig:
        rate = self.mag_learning_rate
        return optimizer.OptimizerConfig(
            learning_rate=self.learning_rate,
            mag_learning_rate=factor * self.learning_rate if rate is None else rate,
            lr_schedule=self.lr_schedule,
            warmup_steps=self.warmup_steps,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
        )
