"""What a parameter is: a weight of the pretrained model, an adapter, or part of the memory.

The types are filters for `nnx.split`, `nnx.DiffState` and the `wrt` of `nnx.Optimizer`:
`nnx.LoRAParam` means everything that was added to the pretrained model, `nnx.Param` everything.
"""

from flax import nnx


class BaseParam(nnx.Param):
    """A weight of the pretrained model."""


class AddedParam(nnx.LoRAParam):
    """A parameter that the pretrained model does not have."""


class AdapterParam(AddedParam):
    """A factor of a low-rank adapter on one of the model's projections."""


class MemoryParam(AddedParam):
    """A parameter of the memory: gates, sizes, and the factors of its own low-rank deltas."""


class MagParam(MemoryParam):
    """A parameter that decides the memory's share; it has a learning rate of its own."""
