"""Random windows for every step, so that one Titan works with several."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class WindowRange:
    """Softmax windows between two bounds, log-uniformly distributed."""

    least: int
    most: int

    @classmethod
    def checked(cls, bounds: tuple[int, int] | None, window: int | None) -> "WindowRange | None":
        """The range of --window-range; None: no range.

        Args:
          bounds: smallest and largest window.
          window: of the model, which no draw may exceed.

        Raises:
          ValueError: if the bounds are out of order or beyond the window.
        """
        if bounds is None:
            return None
        least, most = bounds
        if not 1 <= least <= most:
            raise ValueError(
                f"--window-range expects 1 <= smallest <= largest, got {least} {most}."
            )
        if window is None or most > window:
            raise ValueError(
                f"--window-range reaches {most}, but --liza.softmax-window is {window}: set it to "
                f"{most} or more."
            )
        return cls(least=least, most=most)

    def draw(self, seed: int, stage: str, step: int) -> np.int32:
        """The window of one step, a pure function of its arguments."""
        rng = np.random.default_rng([seed, step, *stage.encode()])
        low, high = math.log(self.least), math.log(self.most + 1)
        return np.int32(min(math.exp(rng.uniform(low, high)), self.most))
