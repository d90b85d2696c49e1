"""The configuration of LoRA adapters and their places."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tptt_jax.config.checks import MAX_RANK, check_at_least, check_at_most
from tptt_jax.config.patterns import check_pattern, matches_whole

# Other names of the same projection in other families.
_OTHER_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("out_proj",)}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685) on the projections that `targets` names."""

    rank: int = 8
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732), so that high ranks learn as well."""
    dropout: float = 0.05
    """Dropout on the adapter's input while training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of projections, or regular expressions that match a whole path such as
    "self_attn.q_proj". Where q, k and v are one projection, each of the three means qkv_proj;
    out_proj means o_proj."""

    def __post_init__(self) -> None:
        """Rejects values no adapter can have."""
        object.__setattr__(self, "targets", tuple(self.targets))
        check_at_least(self, 1, "rank")
        check_at_most(self, MAX_RANK, "rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        for target in self.targets:
            try:
                check_pattern(target)
            except ValueError as error:
                raise ValueError(f"LoRA target {target!r:.200} {error}.") from None

    @property
    def scale(self) -> float:
        """Factor on the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def matches(self, path: str) -> bool:
        """Whether the projection at this dotted path, e.g. "self_attn.q_proj", is adapted."""
        return any(_target_matches(target, path) for target in self.targets)

    def check_targets(self, paths: Iterable[str]) -> None:
        """Raises ValueError if a target names none of the projections at `paths`."""
        known: Sequence[str] = sorted(set(paths))
        for target in self.targets:
            if not any(_target_matches(target, path) for path in known):
                raise ValueError(
                    f"LoRA target {target!r} matches no projection; the model has "
                    f"{', '.join(known)}."
                )


def _target_matches(target: str, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    names = (name, *_OTHER_NAMES.get(name, ()))
    return target in names or any(matches_whole(target, f"{parent}.{each}") for each in names)
