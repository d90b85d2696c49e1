"""Schedules of the learning rate and of the memory's share."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import optax

from tptt_jax.array_typing import Array


@dataclass(frozen=True, kw_only=True)
class MagSchedule:
    """The schedule of the share mu over steps (the reference's LiZACallback)."""

    kind: Literal["constant", "gradual", "cyclic", "switch"] = "gradual"
    """"constant": end; "gradual": linear from start to end; "cyclic": through values, one a
    step; "switch": off and on in turns."""
    start: float = 0.01
    """Share at step 0 ("gradual")."""
    end: float = 0.5
    """Share from step `steps` on ("gradual"), always ("constant"), or when on ("switch")."""
    steps: int = 100
    """Length of the rise ("gradual"), in optimizer steps."""
    values: tuple[float, ...] = (0.01, 0.5)
    """Values of "cyclic"."""
    period: int = 1
    """Steps that "switch" stays off, then on."""

    def __post_init__(self) -> None:
        """Rejects shares outside [0, 1] and empty periods."""
        if self.kind not in ("constant", "gradual", "cyclic", "switch"):
            raise ValueError(
                f"mag schedule must be constant, gradual, cyclic or switch, got {self.kind!r}."
            )
        for value in (self.start, self.end, *self.values):
            if not 0 <= value <= 1:
                raise ValueError(f"a share mu must lie in [0, 1], got {value}.")
        if self.steps < 1 or self.period < 1 or not self.values:
            raise ValueError(
                "a mag schedule needs steps >= 1, period >= 1 and at least one value, got "
                f"{self.steps}, {self.period} and {self.values}."
            )

    def __call__(self, step: Array) -> Array:
        """The share at a traced optimizer step, float32 scalar."""
        step = jnp.asarray(step)
        if self.kind == "constant":
            share = jnp.full((), self.end)
        elif self.kind == "gradual":
            done = jnp.minimum(step / self.steps, 1.0)
            share = self.start + (self.end - self.start) * done
        elif self.kind == "cyclic":
            share = jnp.asarray(self.values)[step % len(self.values)]
        else:
            share = jnp.where((step // self.period) % 2 == 0, 0.0, self.end)
        return share.astype(jnp.float32)


def learning_rate_schedule(
    kind: Literal["constant", "linear", "cosine"], peak: float, steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """A linear warm-up, then constant, or falling to a tenth of the peak.

    Args:
      kind: shape after the warm-up.
      peak: highest rate.
      steps: of the whole run.
      warmup_steps: of the rise from zero.
    """
    rest = max(steps - warmup_steps, 1)
    if kind == "constant":
        after = optax.constant_schedule(peak)
    elif kind == "linear":
        after = optax.linear_schedule(peak, 0.1 * peak, rest)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=0.1)
    else:
        raise ValueError(
            f"learning-rate schedule must be constant, linear or cosine, got {kind!r}."
        )
    if warmup_steps == 0:
        return after
    # Step 0 already moves: a rate of zero would waste the first batch.
    rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])
