"""Rows divided among eight simulated devices: loss and gradients are those of one device."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from tests.contracts import raise_shares, random_tokens, randomize, relative_error
from tests.devices import measured_on_devices
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.sharding import MESH_AXES, batch_sharding, make_mesh, on_mesh, shard_model
from tptt_jax.training.loss import causal_lm_loss

TOKENS = 48
# Documents begin inside a shard, span several, and are shorter than one; padding in the middle.
IDS = np.array(
    [
        np.repeat([1, 2, 3, 0], [19, 3, 23, 3]),
        np.repeat([7, 0, 5, 7], [5, 4, 38, 1]),
        np.repeat([1], [48]),
        np.repeat([4, 0, 4, 9], [10, 2, 6, 30]),
    ]
)
SIZES = {"num_layers": 2, "mlp_dim": 16, "vocab_size": 96}
MIXED = ModelConfig.tiny(**SIZES, layer_kinds=("sliding", "full"), sliding_window=9)


class Case(NamedTuple):
    """A model, and the meshes that it runs on."""

    config: ModelConfig
    liza: LizaConfig
    layouts: tuple[str, ...]
    lora: LoraConfig | None = None
    train_head: bool = False


EVICTED = LizaConfig(operator="gated_delta_rule", softmax_window=4, softmax_sinks=3, memory_rank=2)
CASES = {
    # Two shards of each layout are shorter than the window of the sliding layer.
    "gated delta rule": Case(
        MIXED,
        EVICTED,
        ("context=8", "data=2,context=2,tensor=2"),
        LoraConfig(dropout=0.2),
        train_head=True,
    ),
    "products, wide window": Case(
        ModelConfig.tiny(**SIZES),
        LizaConfig(softmax_window=15, softmax_sinks=2, memory_rank=2, num_householder=2),
        ("context=8", "data=2,fsdp=2,context=2"),
    ),
    "all tokens": Case(
        ModelConfig.tiny(**SIZES),
        LizaConfig(writes="all", num_householder=2, mag_init=0.3),
        ("context=4,tensor=2",),
    ),
}
RUNS = [(name, layout) for name, case in CASES.items() for layout in case.layouts]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, project_dir: Path) -> dict[str, Any]:
    """What `write` has measured on eight devices, by case and layout."""
    path = tmp_path_factory.mktemp("context") / "report.json"
    return measured_on_devices(8, __name__, path, project_dir)


@pytest.mark.parametrize(("name", "layout"), RUNS, ids=map(", ".join, RUNS))
def test_loss_and_gradients_are_those_of_one_device(report, name, layout):
    found = report[name][layout]
    assert found["loss"] <= 1e-6
    assert len(found["gradients"]) > 10
    assert max(found["gradients"].values()) <= 1e-5, found["gradients"]


@pytest.mark.parametrize("name", ["gated delta rule", "products, wide window"])
def test_no_device_gathers_the_activations_of_whole_rows(report, name):
    keys = IDS.size * MIXED.num_kv_heads * MIXED.head_dim
    gathered = report[name]["context=8"]["gathered"]
    assert 0 < max(gathered) < keys


def _on_four_devices(liza: LizaConfig, tokens: int) -> Any:
    """The shapes of a call's results."""
    sizes = tuple(4 if axis == "context" else 1 for axis in MESH_AXES)
    with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, MESH_AXES)):
        return nnx.eval_shape(
            lambda: CausalLM(ModelConfig.tiny(**SIZES), liza, rngs=nnx.Rngs(0))(
                jnp.ones((1, tokens), jnp.int32)
            )
        )


def test_rows_that_the_axis_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"a multiple of 4 tokens.*got 30: pad them"):
        _on_four_devices(EVICTED, 30)


NOT_LINEAR = {
    "reference": {"operator": "tptt_reference"},
    "gelu": {"state_activation": "gelu"},
}


@pytest.mark.parametrize(
    "liza",
    [LizaConfig(writes="all", **x) for x in NOT_LINEAR.values()],
    ids=NOT_LINEAR,
)
def test_an_update_that_is_not_linear_is_refused(liza):
    with pytest.raises(ValueError, match="context=4 needs an update that is linear"):
        _on_four_devices(liza, 32)


def write(path: str) -> None:
    """Compares every case on its meshes with one device, and writes the errors."""
    report = {name: {x: _compare(case, x) for x in case.layouts} for name, case in CASES.items()}
    Path(path).write_text(json.dumps(report))


def _compare(case: Case, layout: str) -> dict[str, Any]:
    """Relative errors of the loss and of each parameter's gradient; numbers in all-gathers."""
    want_loss, want, _ = _reference(case)
    mesh = make_mesh(layout)
    model = _model(case)
    shard_model(model, mesh)
    batch = jax.device_put(_batch(), batch_sharding(mesh))
    with on_mesh(mesh):
        loss, gradients, program = _loss_and_gradients(case, model, batch)
    return {
        "loss": relative_error(loss, want_loss),
        "gradients": {k: relative_error(x, want[k]) for k, x in gradients.items()},
        "gathered": [
            math.prod(map(int, shape.split(",")))
            for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather", program)
        ],
    }


@functools.cache
def _reference(case: Case) -> tuple[Any, dict[str, jax.Array], str]:
    return _loss_and_gradients(case, _model(case), _batch())


def _model(case: Case) -> CausalLM:
    return raise_shares(randomize(CausalLM(case.config, case.liza, case.lora, rngs=nnx.Rngs(0))))


def _batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = random_tokens(IDS.shape, vocab_size=96)
    return tokens, IDS.astype(np.int32), tokens % 5 != 0


def _loss_and_gradients(
    case: Case, model: CausalLM, batch: Any
) -> tuple[jax.Array, dict[str, jax.Array], str]:
    """The loss, gradients by path, and the compiled program."""
    but_head = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("embed")))
    trained = nnx.Param if case.train_head else but_head
    graphdef, parameters, rest = nnx.split(model, trained, ...)

    @jax.jit
    def run(parameters: Any, rest: Any, batch: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            model = nnx.merge(graphdef, parameters, rest)
            options: Any = {"train_head": case.train_head, "dropout_key": jax.random.key(0)}
            total, count = causal_lm_loss(model, *batch, **options)
            return total / jnp.maximum(count, 1)

        return jax.value_and_grad(loss)(parameters)

    program = run.lower(parameters, rest, batch).compile()
    loss, gradients = program(parameters, rest, batch)
    flat = {".".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(gradients)}
    return loss, flat, program.as_text()
