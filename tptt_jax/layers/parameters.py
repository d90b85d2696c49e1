"""Parameter types: weights of the pretrained model, adapters, and parts of the memory.

The types are filters for `nnx.split`, `nnx.DiffState` and the `wrt` of `nnx.Optimizer`:
`nnx.LoRAParam` means everything that was added to the pretrained model, `nnx.Param` everything.
"""

from typing import Self

from flax import nnx


class BaseParam(nnx.Param):
    """A weight of the pretrained model."""


class AddedParam(nnx.LoRAParam):
    """A parameter that is added to the pretrained model."""


class AdapterParam(AddedParam):
    """A factor of a low-rank adapter on one of the model's projections."""


class MemoryParam(AddedParam):
    """A parameter of the memory: gates, sizes, and the factors of its own low-rank deltas."""


class MagParam(MemoryParam):
    """A parameter of the memory's share; it has a separate learning rate."""


class JoinedHeads(str):
    """The name of a logical axis on which the channels of several heads lie side by side.

    It is a name like any other; `tptt_jax.sharding` divides such an axis between heads only.
    """

    heads: int

    def __new__(cls, name: str, heads: int) -> Self:
        """Names an axis of `heads` heads."""
        axis = super().__new__(cls, name)
        axis.heads = heads
        return axis

    def __reduce__(self) -> tuple[type[Self], tuple[str, int]]:
        """Supports copy and pickle."""
        return type(self), (str(self), self.heads)
