"""Where a run's batches and states lie: on one device, or divided over a mesh."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments.data import TokenBatch
from tptt_jax.processes import put
from tptt_jax.sharding import batch_sharding, own_rows
from tptt_jax.training.train_step import Batch, TrainState, place_state

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Puts rows and states on the devices of a run."""

    mesh: "Mesh | None"
    """None: the default device."""
    rows_per_step: int

    @property
    def own_rows(self) -> slice:
        """The rows of a step that this process reads: those that its devices work on."""
        if self.mesh is None:
            return slice(0, self.rows_per_step)
        return own_rows(self.mesh, self.rows_per_step)

    def put(self, batch: TokenBatch) -> Batch:
        """Moves a batch to the devices; rows are padded where the mesh divides their tokens."""
        if self.mesh is None:
            return Batch(*jax.device_put(tuple(batch)))
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        even = len(batch.tokens) % shards == 0
        sharding = batch_sharding(self.mesh, divide_rows=even)
        return Batch(*(put(array, sharding) for array in self._padded(batch, self.mesh)))

    def put_own(self, batch: TokenBatch) -> Batch:
        """`put` of this process's part of a step's rows, see `own_rows`."""
        if self.mesh is None or jax.process_count() == 1:
            return self.put(batch)
        sharding, arrays = batch_sharding(self.mesh), self._padded(batch, self.mesh)
        whole = (self.rows_per_step, arrays[0].shape[1])
        return Batch(*(jax.make_array_from_process_local_data(sharding, x, whole) for x in arrays))

    def place(self, state: TrainState) -> TrainState:
        """A state whose arrays are all on the mesh."""
        return state if self.mesh is None else place_state(state, self.mesh)

    def _padded(self, batch: TokenBatch, mesh: "Mesh") -> list[np.ndarray]:
        pad = ((0, 0), (0, -batch.tokens.shape[1] % mesh.shape["context"]))
        return [np.pad(array, pad) for array in batch]
