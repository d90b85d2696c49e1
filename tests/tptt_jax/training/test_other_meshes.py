"""A run that was saved on one mesh and goes on with another."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import random_tokens, randomize
from tests.devices import run_on_devices
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.sharding import batch_sharding, make_mesh, shard_model
from tptt_jax.training.checkpoint import RunCheckpoints
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.schedules import MagSchedule
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step, place_state

LAYOUTS = {"one device": "", "data and fsdp": "data=2,fsdp=2", "tensor": "tensor=2"}
CONFIG = ModelConfig.tiny(num_layers=1, mlp_dim=16, vocab_size=64)
LIZA = LizaConfig(writes="all", mag="scheduled", chunk_size=8, memory_rank=2)
BEFORE, AFTER = 2, 2


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, project_dir: Path) -> dict[str, list[float]]:
    """Losses after the checkpoint, by where it was saved and where it was restored."""
    path = tmp_path_factory.mktemp("meshes")
    program = f"from tests.tptt_jax.training import test_other_meshes as t; t.main({str(path)!r})"
    run_on_devices(4, program, project_dir)
    return json.loads((path / "losses.json").read_text())


@pytest.mark.parametrize("restored", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_the_next_losses_are_those_of_the_mesh_that_saved(losses, saved, restored):
    want, got = losses[saved], losses[f"{saved} -> {restored}"]
    assert len(got) == AFTER
    np.testing.assert_allclose(got, want, rtol=1e-5)
    if saved == restored:
        assert got == want  # bit for bit
    # A forgotten optimizer, share or step would show.
    assert abs(want[0] - losses["without the checkpoint"][0]) > 1e-3 * want[0]


def main(directory: str) -> None:
    """Saves on every mesh, and goes on with every other one; writes losses.json."""
    runs = {name: _Training(layout) for name, layout in LAYOUTS.items()}
    found, states = {}, {}
    for name, run in runs.items():
        state, first = run.steps(run.initial(), BEFORE)
        found["without the checkpoint"] = first
        with RunCheckpoints(Path(directory) / name) as checkpoints:
            checkpoints.save(state)
        states[name] = jax.tree.map(np.asarray, _plain(state))
        _, found[name] = run.steps(state, AFTER)
    for (saved, values), (restored, run) in product(states.items(), runs.items()):
        with RunCheckpoints(Path(directory) / saved) as checkpoints:
            state = checkpoints.restore(run.initial())
        # Parameters, moments, share, step and key.
        jax.tree.map(np.testing.assert_array_equal, _plain(state), values)
        for value in state.trainable.values():
            assert len(value.sharding.device_set) == run.mesh.size
        _, found[f"{saved} -> {restored}"] = run.steps(state, AFTER)
    (Path(directory) / "losses.json").write_text(json.dumps(found))


def _plain(state: Any) -> Any:
    return state._replace(key=jax.random.key_data(state.key))


class _Training:
    def __init__(self, layout: str) -> None:
        self.mesh = make_mesh(layout)
        lora = LoraConfig(rank=2, dropout=0.1)
        model = randomize(CausalLM(CONFIG, LIZA, lora, rngs=nnx.Rngs(0)))
        shard_model(model, self.mesh)
        self._partition, self._trainable, self._share = split_trainable(model, "lora")
        self._optimizer = make_optimizer(
            OptimizerConfig(learning_rate=1e-2), BEFORE + AFTER, self._partition
        )
        schedule = MagSchedule(kind="gradual", start=0.1, end=0.9, steps=BEFORE + AFTER)
        self._step = make_train_step(self._partition, self._optimizer, mag_schedule=schedule)
        tokens = jnp.asarray(random_tokens((4, 12), vocab_size=CONFIG.vocab_size))
        batch = Batch(tokens, jnp.ones_like(tokens), tokens >= 0)
        self._batch = jax.device_put(batch, batch_sharding(self.mesh))

    def initial(self) -> Any:
        key = jax.random.key(0)
        state = init_train_state(self._trainable, self._share, self._optimizer, key)
        return place_state(state, self.mesh)

    def steps(self, state: Any, count: int) -> tuple[Any, list[float]]:
        losses = []
        for _ in range(count):
            state, metrics = self._step(state, self._partition.frozen, self._batch)
            losses.append(float(metrics.loss))
        return state, losses
