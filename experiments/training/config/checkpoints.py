"""The options of checkpoints, and of the held-out loss while a run trains."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and what stays."""

    checkpoint_every: int = 20
    """Steps between checkpoints; the last step always saves one."""
    keep_last: int = 2
    """Newest checkpoints that stay on disk, in each stage; older ones are removed once a newer one
    is complete. With 1 a kill still loses nothing, but a checkpoint that is damaged later has none
    before it to fall back on."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        for name in ("checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """When the held-out loss is measured, and what it decides."""

    eval_every: int = 0
    """Steps between evaluations on the held-out part; 0: only before and after."""
    early_stop: int | None = None
    """Evaluations without a lower held-out loss after which training ends; None: after all steps.
    Needs --eval-every."""
    keep_best: bool = False
    """Also keep the weights with the lowest held-out loss, in the folder best of output, which is
    loaded like a run. Needs --eval-every."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be at least 0, got {self.eval_every}.")
        if self.early_stop is not None and self.early_stop < 1:
            raise ValueError(f"early_stop must be at least 1, got {self.early_stop}.")
        for name in ("early_stop", "keep_best"):
            if getattr(self, name) and not self.eval_every:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} needs evaluations while training: add --eval-every.")
