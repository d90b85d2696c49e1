"""The memory's own computation: keys and values of written tokens, chunks, precision."""

from dataclasses import dataclass
from typing import Literal

from tptt_jax.config.checks import MAX_RANK, check_at_least, check_at_most, check_choice

Precision = Literal["auto", "highest", "high", "default"]


@dataclass(frozen=True, kw_only=True)
class Computation:
    """The memory's deltas on keys and values, and how it is computed; a part of `LizaConfig`."""

    horizon: int | None = None
    """With writes="evicted": while the memory holds more tokens than this, it forgets faster: no
    half-life is longer than half of it. A memory that has only met shorter rows keeps too much of
    longer ones. None: the forget gate alone decides."""
    memory_rank: int | None = None
    """Rank of the memory's own low-rank deltas on queries, keys and values; 0: none. None: 16 with
    writes="evicted", else 0."""
    memory_alpha: float = 16.0
    """The deltas are scaled by memory_alpha / memory_rank."""
    dropout: float = 0.0
    """Dropout on the memory's output while training."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; the result does not depend on it, but for
    state_activation and operator="tptt_reference"."""
    precision: Precision = "auto"
    """Precision of the matrix products that read and write the memory of a row: "highest" is
    float32 on every backend; "high" and "default" are faster on a GPU or TPU, with fewer bits (on a
    CPU all three are equal). "auto" is "highest" in a float32 model and "default" in half
    precision. The state, the inverse of each chunk's system and single tokens stay exact."""

    def _check_computation(self) -> None:
        """Raises ValueError if a size, the precision or the dropout is impossible."""
        check_choice("precision", self.precision, Precision)
        check_at_least(self, 1, "chunk_size", "horizon")
        check_at_least(self, 0, "memory_rank")
        check_at_most(self, MAX_RANK, "memory_rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
