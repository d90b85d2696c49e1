"""Types of parameters that are not weights of the pretrained model."""

from flax import nnx


class MemoryParam(nnx.Param):
    """A parameter of the memory: gates and sizes. Its low-rank deltas are `nnx.LoRAParam`s."""


class MagParam(MemoryParam):
    """A parameter of the memory's share; it has a learning rate of its own."""
