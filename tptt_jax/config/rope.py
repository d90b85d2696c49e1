"""The configuration of rotary position embeddings: the base, and scaling for longer contexts."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Self

from tptt_jax.config.checks import check_choice

RopeScaling = Literal["none", "linear", "llama3", "yarn", "dynamic", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer, as transformers computes it."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    scaling: RopeScaling = "none"
    """How the frequencies were stretched for longer contexts. "yarn" is arXiv:2309.00071,
    "longrope" arXiv:2402.13753. "dynamic" (a base that grows with the length, NTK) and "longrope"
    depend on the length of the text, see `at_length`."""
    factor: float = 1.0
    """Stretch factor of all but "none"; "longrope" takes only its attention factor from it."""
    low_freq_factor: float = 1.0
    """"llama3": wavelengths above original_max_positions / this are stretched fully."""
    high_freq_factor: float = 4.0
    """"llama3": wavelengths below original_max_positions / this are unchanged."""
    original_max_positions: int = 8192
    """All but "none" and "linear": the context length before stretching, in tokens."""
    attention_factor: float | None = None
    """"yarn" and "longrope": factor on cosine and sine, so that logits have its square; None: what
    the paper recommends for `factor`."""
    beta_fast: float = 32.0
    """"yarn": channels that turn more often than this in the original context are unchanged."""
    beta_slow: float = 1.0
    """"yarn": channels that turn less often than this are stretched fully."""
    mscale: float | None = None
    """"yarn": with mscale_all_dim, weights of the recommended attention factor."""
    mscale_all_dim: float | None = None
    """"yarn": see mscale."""
    truncate: bool = True
    """"yarn": the range of channels between beta_fast and beta_slow is rounded outwards."""
    short_factor: tuple[float, ...] = ()
    """"longrope": divisor of each frequency in texts up to original_max_positions tokens."""
    long_factor: tuple[float, ...] = ()
    """"longrope": the same in longer texts."""

    def __post_init__(self) -> None:
        """Rejects values no rotary embedding can have."""
        check_choice("rope scaling", self.scaling, RopeScaling)
        if not (0 < self.theta < math.inf and 0 < self.factor < math.inf):
            raise ValueError(
                f"rope theta and factor must be positive, got {self.theta} and {self.factor}."
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(
                f"rope attention_factor must be positive or None, got {self.attention_factor}."
            )
        if self.original_max_positions < 1:
            raise ValueError(
                "rope original_max_positions must be at least 1, got "
                f"{self.original_max_positions}."
            )
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "llama3 rope scaling needs low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if self.scaling == "yarn":
            self._check_yarn()
        if self.scaling == "longrope":
            self._check_longrope()

    def _check_yarn(self) -> None:
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ValueError(
                "yarn rope scaling needs 0 < beta_slow <= beta_fast, got "
                f"{self.beta_slow} and {self.beta_fast}."
            )
        if self.theta <= 1:
            raise ValueError(f"yarn rope scaling needs theta above 1, got {self.theta}.")
        if not 0 < self.attention_scale < math.inf:
            raise ValueError(
                f"rope mscale {self.mscale} and mscale_all_dim {self.mscale_all_dim} give no "
                "positive attention factor."
            )

    def _check_longrope(self) -> None:
        if self.original_max_positions < 2:
            raise ValueError("longrope scaling needs original_max_positions of at least 2, got 1.")
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"longrope scaling needs as many short factors as long ones, got "
                f"{len(self.short_factor)} and {len(self.long_factor)}."
            )
        if not all(0 < x < math.inf for x in (*self.short_factor, *self.long_factor)):
            raise ValueError("the factors of longrope scaling must be positive numbers.")

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError if heads of this width do not fit the scaling."""
        if self.scaling == "dynamic" and head_dim < 4:
            raise ValueError(f"dynamic rope scaling needs head_dim of at least 4, got {head_dim}.")
        if self.scaling == "longrope" and len(self.short_factor) != head_dim // 2:
            raise ValueError(
                f"longrope scaling needs {head_dim // 2} factors (head_dim / 2), got "
                f"{len(self.short_factor)}."
            )

    @property
    def attention_scale(self) -> float:
        """Factor on cosine and sine."""
        if self.scaling not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling == "longrope":
            if self.factor <= 1:
                return 1.0
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_positions))
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1

    @property
    def depends_on_length(self) -> bool:
        """Whether texts longer than original_max_positions have other frequencies."""
        if self.scaling == "longrope":
            return self.short_factor != self.long_factor
        return self.scaling == "dynamic"

    def at_length(self, tokens: int, head_dim: int) -> Self:
        """The embedding of texts of this length, with fixed frequencies."""
        if not self.depends_on_length:
            return self
        if self.scaling == "longrope":
            is_long = tokens > self.original_max_positions
            factors = self.long_factor if is_long else self.short_factor
            return dataclasses.replace(self, short_factor=factors, long_factor=factors)
        growth = self.factor * max(tokens / self.original_max_positions, 1) - (self.factor - 1)
        theta = self.theta * growth ** (head_dim / (head_dim - 2))
        return type(self)(theta=theta)
