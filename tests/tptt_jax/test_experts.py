"""Experts on a mesh: each device runs its own, and the results are those of one device."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.contracts import randomize, relative_error
from tests.devices import measured_on_devices
from tests.mesh_programs import VOCAB_SIZE, gathered_shapes, loss_and_gradients, packed_rows
from tptt_jax import CausalLM, ModelConfig
from tptt_jax.config import AttentionConfig, ExpertsConfig
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.sharding import RULES, batch_sharding, make_mesh, on_mesh, shard_model

CONFIG = ModelConfig.tiny(
    family="olmoe",
    num_layers=2,
    embed_dim=48,
    mlp_dim=64,
    vocab_size=VOCAB_SIZE,
    experts=ExpertsConfig(number=8, per_token=2),
    attention=AttentionConfig(qk_norm="full"),
)
BY_EXPERT = {**RULES, "experts": "tensor"}
LAYOUTS: dict[str, tuple[str, Mapping[str, str]]] = {
    "experts": ("data=2,tensor=4", BY_EXPERT),
    "width of each": ("fsdp=2,context=2,tensor=2", RULES),
    # Devices that hold other rows cannot share them: each gathers all experts.
    "experts where rows are": ("data=2", {**RULES, "experts": "data"}),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, project_dir: Path) -> dict[str, Any]:
    """What `write` has measured on eight devices."""
    path = tmp_path_factory.mktemp("experts") / "report.json"
    return measured_on_devices(8, __name__, path, project_dir)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_device(report, name):
    found = report["layouts"][name]
    assert found["loss"] <= 1e-6
    assert any("mlp.down_proj" in path for path in found["gradients"])
    assert max(found["gradients"].values()) <= 1e-5, found["gradients"]


def test_devices_hold_and_read_only_their_experts(report):
    assert report["layouts"]["experts"]["share"] == 1 / 4
    # Neither weights nor the tokens that go to them.
    assert report["layouts"]["experts"]["largest"] < CONFIG.embed_dim * CONFIG.mlp_dim


@pytest.mark.parametrize("call", ["own mesh", "int8", "vmap"])
def test_logits_are_those_of_one_device(report, call):
    assert report["calls"][call] <= 1e-5


def write(path: str) -> None:
    """Compares meshes with one device, and writes the results."""
    expected = loss_and_gradients(_model(), packed_rows())[:2]
    layouts = {name: _compare(expected, *LAYOUTS[name]) for name in LAYOUTS}
    Path(path).write_text(json.dumps({"layouts": layouts, "calls": _other_calls()}))


def _model(base_dtype: BaseDtype | None = None) -> CausalLM:
    model = CausalLM(CONFIG, base_dtype=base_dtype, rngs=nnx.Rngs(0))
    return model if base_dtype else randomize(model)


def _compare(expected: tuple[Any, Any], layout: str, rules: Mapping[str, str]) -> dict[str, Any]:
    """Relative errors, a device's share of the experts, and the largest array in an all-gather."""
    mesh, model = make_mesh(layout), _model()
    shard_model(model, mesh, rules)
    batch = jax.device_put(packed_rows(), batch_sharding(mesh))
    with on_mesh(mesh, rules):
        loss, gradients, program = loss_and_gradients(model, batch)
    kernel = model.stacks[0].mlp.up_proj.kernel.get_value()
    return {
        "loss": relative_error(loss, expected[0]),
        "gradients": {k: relative_error(x, expected[1][k]) for k, x in gradients.items()},
        "share": kernel.addressable_shards[0].data.size / kernel.size,
        "largest": max(map(math.prod, gathered_shapes(program)), default=0),
    }


def _other_calls() -> dict[str, float]:
    """Errors of logits on a mesh with an axis for experts, of quantised ones, and under vmap."""
    devices = np.array(jax.devices()).reshape(2, 4)
    mine = Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    ours = make_mesh("data=2,tensor=4")
    tokens = jnp.asarray(packed_rows()[0])

    @nnx.jit
    def logits(model: CausalLM, tokens: jax.Array) -> jax.Array:
        return model(tokens).logits

    @nnx.jit
    def mapped(model: CausalLM, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda rows: model(rows).logits)(tokens.reshape(2, 4, -1))

    def error(run: Any, mesh: Mesh, rules: Mapping[str, str], dtype: BaseDtype | None) -> float:
        expected, model = run(_model(dtype), tokens), _model(dtype)
        shard_model(model, mesh, rules)
        placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
        with on_mesh(mesh, rules):
            return relative_error(run(model, placed), expected)

    return {
        "own mesh": error(logits, mine, {"experts": "expert"}, None),
        "int8": error(logits, ours, BY_EXPERT, "int8"),
        "vmap": error(mapped, ours, BY_EXPERT, None),
    }
