"""How the memory's output is sized and mixed with that of softmax attention."""

from dataclasses import dataclass
from typing import Literal

from tptt_jax.config.checks import check_choice

Mag = Literal["mass", "learned", "scheduled"]
LinearScale = Literal["learned", "match", "unit", "projected"]


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """The memory's share of the output and its size; a part of `LizaConfig`."""

    mag: Mag | None = None
    """The memory's share of the output. "mass": the estimated softmax mass of the
    evicted tokens over all mass, per head and token; the default with writes="evicted".
    "learned": one logit per head, the default with writes="all"; "scheduled": one value for the
    model, set from outside."""
    mag_init: float = 0.05
    """Initial share, in (0, 1) for "learned", in [0, 1] for "scheduled"."""
    linear_scale: LinearScale | None = None
    """Size of the memory's output. "learned": a factor per head and query; the default with
    writes="evicted". "match": each head gets the RMS of its softmax output; the default with
    writes="all". "unit": the paper's unit RMS; "projected": the reference's base_scale_attn, after
    the projection."""
    cross_gate: bool = False
    """Add the product of both terms to their sum, after the projection."""

    def _check_mixing(self) -> None:
        """Raises ValueError if a choice is unknown or the initial share impossible."""
        check_choice("mag", self.mag, Mag)
        check_choice("linear_scale", self.linear_scale, LinearScale)
        if self.mag == "learned" and not 0 < self.mag_init < 1:
            raise ValueError(f"mag_init must lie strictly between 0 and 1, got {self.mag_init}.")
        if not 0 <= self.mag_init <= 1:
            raise ValueError(f"mag_init must lie between 0 and 1, got {self.mag_init}.")
