"""What a trial of the Pallas kernels is for."""

from typing import NamedTuple


class KernelKind(NamedTuple):
    """What a trial is for; another number of chunks or heads is taken to be the same.

    Attributes:
      dim: channels D of queries and keys.
      value_dim: channels Dv of values.
      steps: Householder steps N.
      group: query heads of a KV head.
      gate: dtype of the write gate.
      per_channel: whether the write gate has a value for every channel.
      decay: whether there is a forget gate.
      documents: whether there are document ids.
    """

    dim: int
    value_dim: int
    steps: int
    group: int
    gate: str
    per_channel: bool
    decay: bool
    documents: bool
