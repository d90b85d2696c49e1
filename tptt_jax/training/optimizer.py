"""AdamW over the trainable parameters, with a separate learning rate for the shares."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import optax

from tptt_jax.layers.parameters import MagParam
from tptt_jax.training.partition import Partition, Trainable
from tptt_jax.training.schedules import learning_rate_schedule


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 5e-4
    """Peak rate of all parameters but the learned shares."""
    mag_learning_rate: float = 5e-2
    """Peak rate of the memory's share: about 100 times LoRA's for single logits, LoRA's own for
    mass gates."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    """Share of all steps over which the rates rise, instead of warmup_steps."""
    weight_decay: float = 0.0
    """On matrices only: not on norms, biases and shares."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        """Rejects negative rates."""
        for name in ("learning_rate", "mag_learning_rate", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1], got {self.warmup_ratio}.")
        if self.grad_clip <= 0:
            raise ValueError(f"grad_clip must be positive, got {self.grad_clip}.")

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of everything but the shares."""
        return self.schedule_to(self.learning_rate, steps)

    def schedule_to(self, peak: float, steps: int) -> optax.Schedule:
        """The rate of a run of `steps` that rises to `peak`."""
        ratio = self.warmup_ratio
        rise = self.warmup_steps if ratio is None else math.ceil(ratio * steps)
        return learning_rate_schedule(self.lr_schedule, peak, steps, rise)


def make_optimizer(
    config: OptimizerConfig, steps: int, partition: Partition
) -> optax.GradientTransformation:
    """Clips the global norm, then applies AdamW, with a separate rate for each `MagParam`.

    Args:
      config: rates.
      steps: of the whole run, for the schedule.
      partition: of the parameters, from `split_trainable`.

    Returns:
      A transformation of dicts of parameters by dotted path.
    """
    shares = partition.names(MagParam)

    def is_decayed(name: str) -> bool:
        """Matrices are, but no gates."""
        is_matrix = name.rsplit(".", 1)[-1] in ("kernel", "embedding", "a", "b")
        return is_matrix and name not in shares and ".memory.gates." not in name

    def adamw(peak: float, *, decay: bool) -> optax.GradientTransformation:
        return optax.adamw(
            config.schedule_to(peak, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay if decay else 0.0,
            mask=decay_mask,
        )

    def decay_mask(params: Any) -> dict[str, bool]:
        return {name: is_decayed(name) for name in params}

    def labels(params: Trainable) -> dict[str, str]:
        return {name: "share" if name in shares else "weights" for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.partition(
            {
                "weights": adamw(config.learning_rate, decay=True),
                "share": adamw(config.mag_learning_rate, decay=False),
            },
            labels,
        ),
    )
