"""The options of a share of the memory that follows a schedule."""

from dataclasses import dataclass
from typing import Literal

from experiments.data.config import check_literals
from tptt_jax.training.schedules import MagSchedule


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """The schedule of the memory's share, with --liza.mag scheduled."""

    mag_schedule: Literal["constant", "gradual", "cyclic", "switch"] = "constant"
    """With --liza.mag scheduled, the memory's share: "constant": mag_start; "gradual": from
    mag_start to mag_end over mag_steps; "cyclic": mag_values in turn; "switch": 0 and mag_end in
    turn."""
    mag_start: float | None = None
    """First share; None: --liza.mag-init."""
    mag_end: float = 0.5
    """Last share of "gradual", and the share of "switch" when on."""
    mag_steps: int = 100
    """Steps from mag_start to mag_end."""
    mag_values: tuple[float, ...] = (0.01, 0.5)
    """Shares of "cyclic"."""
    mag_period: int = 1
    """Steps for which "switch" stays off, then on."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        check_literals(self)
        self.starting_at(0.0)

    def starting_at(self, share: float) -> MagSchedule:
        """The schedule, from a first share unless mag_start is given."""
        start = share if self.mag_start is None else self.mag_start
        return MagSchedule(
            kind=self.mag_schedule,
            start=start,
            end=start if self.mag_schedule == "constant" else self.mag_end,
            steps=self.mag_steps,
            values=self.mag_values,
            period=self.mag_period,
        )
