"""Activations on a mesh: which axes are divided, and what the compiled programs exchange."""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.contracts import randomize, relative_error
from tests.devices import measured_on_devices
from tests.mesh_programs import (
    TOKENS,
    VOCAB_SIZE,
    gathered_shapes,
    loss_and_gradients,
    packed_rows,
)
from tptt_jax import CausalLM, LoraConfig, ModelConfig, generate
from tptt_jax.ops.context import split_tokens
from tptt_jax.ops.placement import assign_axes, constrain
from tptt_jax.sharding import RULES, batch_sharding, make_mesh, off_mesh, on_mesh, shard_model

# No width is a multiple of 11, as the number of tokens is: arrays of such a size are activations.
CONFIG = ModelConfig.tiny(num_layers=2, embed_dim=48, mlp_dim=80, vocab_size=VOCAB_SIZE)
LAYOUTS = ("data=8", "fsdp=4", "tensor=2", "data=2,fsdp=2,tensor=2")
# Four devices share two KV heads: each has both, and one or two of the four query heads.
UNEVEN = ("tensor=4", "data=2,tensor=4")

SIZES = {"data": 2, "fsdp": 2, "context": 3, "tensor": 4}
HEADS = ("rows", "tokens", "heads", None)
AXES = {"rows": ("data", "fsdp"), "tokens": "context", **RULES}
ASSIGNED = {
    "all": (HEADS, (4, 6, 8, 16), AXES, [("data", "fsdp"), "context", "tensor", None]),
    "one row": (HEADS, (1, 6, 8, 16), AXES, [None, "context", "tensor", None]),
    "rows of data alone": (HEADS, (2, 6, 8, 16), AXES, [None, "context", "tensor", None]),
    "two KV heads": (HEADS, (4, 7, 2, 16), AXES, [("data", "fsdp"), None, None, None]),
    "axes used once": (("rows", "mlp"), (4, 8), AXES | {"mlp": "fsdp"}, [("data", "fsdp"), None]),
}


@pytest.mark.parametrize(("names", "shape", "rules", "expected"), ASSIGNED.values(), ids=ASSIGNED)
def test_axes_go_where_the_mesh_divides_them(names, shape, rules, expected):
    assert assign_axes(names, shape, SIZES, rules) == expected


def _constraints(run: Any, *args: Any) -> list[P]:
    """The specs of a traced function."""
    text = str(jax.make_jaxpr(run)(*args))
    return re.findall(r"spec=(P\(.*?\)), memory_kind", text)


def test_rules_say_where_activations_go():
    mesh, x = make_mesh(""), jnp.ones((2, 4, 2, 8))

    def run(x: jax.Array) -> jax.Array:
        return constrain(x, *HEADS)

    assert run(x) is x
    with on_mesh(mesh):
        assert _constraints(run, x) == ["P(('data', 'fsdp'), 'context', 'tensor', None)"]
        with off_mesh():
            assert run(x) is x
    with on_mesh(mesh, {"heads": "fsdp"}):  # which rows have taken
        assert _constraints(run, x) == ["P(('data', 'fsdp'), 'context', None, None)"]
    mine = jax.make_mesh((1, 1), ("batch", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with on_mesh(mine, {"heads": "model"}):
        assert _constraints(run, x) == ["P(UNCONSTRAINED, UNCONSTRAINED, 'model', None)"]


def test_parts_that_are_divided_by_hand_have_no_constraints():
    def run(x: jax.Array) -> jax.Array:
        return split_tokens(lambda y: constrain(y, *HEADS), (x,))

    mesh = make_mesh("")
    with jax.set_mesh(mesh), on_mesh(mesh):
        assert _constraints(run, jnp.ones((2, 4, 2, 8))) == []


def test_other_rules_compile_again():
    traced = []

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        traced.append(x)
        return constrain(x, "rows", "mlp")

    for rules in (RULES, RULES, {"mlp": "fsdp"}):
        with on_mesh(make_mesh(""), rules):
            run(jnp.ones((2, 4)))
    assert len(traced) == 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, project_dir: Path) -> dict[str, Any]:
    """What `write` has measured on eight devices."""
    path = tmp_path_factory.mktemp("placement") / "report.json"
    return measured_on_devices(8, __name__, path, project_dir)


@pytest.mark.parametrize("layout", LAYOUTS + UNEVEN)
def test_loss_and_gradients_are_those_of_one_device(report, layout):
    found = report["constrained"][layout]
    assert found["loss"] <= 1e-6
    assert len(found["gradients"]) > 10
    # Float32 sums in another order; 1.02e-5 was the most on any machine.
    assert max(found["gradients"].values()) <= 2e-5, found["gradients"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_device_gathers_activations(report, layout):
    """Weights that fsdp divides are gathered instead."""
    # A table that is divided both ways is looked up in parts of the width.
    looked_up = [[4, TOKENS, CONFIG.embed_dim // 2]] if layout.endswith("fsdp=2,tensor=2") else []
    assert report["constrained"][layout]["gathered"] == looked_up


def test_xla_alone_gathers_activations_where_fsdp_divides_weights(report):
    free, constrained = report["free"]["fsdp=4"], report["constrained"]["fsdp=4"]
    assert [8, TOKENS, CONFIG.vocab_size] in free["gathered"]
    assert constrained["reduced"] < free["reduced"]


@pytest.mark.parametrize("call", ["three rows", "vmap"])
def test_logits_of_other_calls_are_those_of_one_device(report, call):
    assert report["calls"][call] <= 1e-5


def test_decoding_on_a_mesh_gives_the_same_tokens(report):
    assert report["calls"]["generate"]


def write(path: str) -> None:
    """Compares meshes with one device, with constraints and without; writes the results."""
    expected = loss_and_gradients(_model(), packed_rows())[:2]
    report = {
        "constrained": {x: _compare(expected, x, on=True) for x in LAYOUTS + UNEVEN},
        "free": {"fsdp=4": _compare(expected, "fsdp=4", on=False)},
        "calls": _other_calls(),
    }
    Path(path).write_text(json.dumps(report))


def _model() -> CausalLM:
    return randomize(CausalLM(CONFIG, None, LoraConfig(rank=2), rngs=nnx.Rngs(0)))


def _compare(expected: tuple[Any, Any], layout: str, *, on: bool) -> dict[str, Any]:
    """Relative errors; shapes of activations in all-gathers; the number of all-reduces."""
    mesh, model = make_mesh(layout), _model()
    shard_model(model, mesh)
    batch = jax.device_put(packed_rows(), batch_sharding(mesh))
    with on_mesh(mesh) if on else contextlib.nullcontext():
        loss, gradients, program = loss_and_gradients(model, batch)
    return {
        "loss": relative_error(loss, expected[0]),
        "gradients": {k: relative_error(x, expected[1][k]) for k, x in gradients.items()},
        "gathered": [x for x in gathered_shapes(program) if math.prod(x) % 11 == 0],
        "reduced": len(re.findall(r" all-reduce\(", program)),
    }


def _other_calls() -> dict[str, Any]:
    """Calls whose rows no mesh divides, under `jax.vmap`, and with a cache where tokens divide."""
    one, mesh = _model(), make_mesh("data=2,context=2,tensor=2")
    tokens = jnp.asarray(packed_rows()[0])
    many = _model()
    shard_model(many, mesh)

    @nnx.jit
    def logits(model: CausalLM, tokens: jax.Array) -> jax.Array:
        return model(tokens).logits

    @nnx.jit
    def mapped(model: CausalLM, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda rows: model(rows).logits)(tokens)

    pairs = tokens[:4].reshape(2, 2, -1)
    expected = {"three rows": logits(one, tokens[:3]), "vmap": mapped(one, pairs)}
    continued = generate(one, tokens[:2], 5).tokens
    with on_mesh(mesh):
        found = {"three rows": logits(many, tokens[:3]), "vmap": mapped(many, pairs)}
        same = bool(jnp.all(generate(many, tokens[:2], 5).tokens == continued))
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    return errors | {"generate": same}
