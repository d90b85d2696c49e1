"""The model of weak scaling: its bytes are those that the program exchanges."""

import json
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from convert.command_line import run_command
from experiments.bench import COMMANDS
from experiments.benchmarks.context_costs import layer_exchange, scan_rounds, step_cost
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.sharding import MESH_AXES

TOKENS = 128  # of a shard
CONFIG = ModelConfig.tiny(num_layers=2)
MEMORIES = {
    "memory": LizaConfig(softmax_window=64, softmax_sinks=2, operator="gated_delta_rule"),
    "wide window": LizaConfig(softmax_window=300, softmax_sinks=2, num_householder=2),
    "window alone": LizaConfig(softmax_window=64, writes="none"),
    "full": None,
}


@pytest.mark.parametrize("shards", [2, 8, 64])
@pytest.mark.parametrize("liza", MEMORIES.values(), ids=MEMORIES)
def test_bytes_are_those_of_the_traced_program(liza, shards):
    layers = range(CONFIG.num_layers)
    parts = [layer_exchange(CONFIG, liza, i, tokens=TOKENS, shards=shards, width=4) for i in layers]
    want = sum(part.bytes for part in parts)
    # Counts of tokens and single tokens of Householder steps are left out.
    np.testing.assert_allclose(_traced_bytes(liza, shards), want, rtol=0.02)


def _traced_bytes(liza: LizaConfig | None, shards: int) -> float:
    """Bytes of floating-point numbers that one device receives in a forward pass."""
    model = nnx.eval_shape(lambda: CausalLM(CONFIG, liza, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, TOKENS * shards), jnp.int32)

    def run(state: Any, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state).forward_hidden(tokens, ids)[0]

    sizes = {"context": shards}
    with jax.sharding.use_abstract_mesh(
        AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    ):
        return _received(jax.make_jaxpr(run)(state, tokens, tokens).jaxpr, shards)


def _received(jaxpr: Any, shards: int) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        size = sum(
            x.aval.size * x.aval.dtype.itemsize
            for x in eqn.invars
            if jnp.issubdtype(getattr(x.aval, "dtype", jnp.int32), jnp.floating)
        )
        factors = {"ppermute": 1, "all_gather": shards - 1, "reduce_scatter": 1 - 1 / shards}
        total += size * factors.get(eqn.primitive.name, 0)
        inner = [_received(x, shards) for x in jax.extend.core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            # Of two ways to take tokens the usual one is the cheaper.
            total += min(inner)
        else:
            total += sum(inner) * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize(("shards", "rounds"), [(2, 0), (3, 1), (4, 2), (5, 2), (512, 9)])
def test_rounds_of_the_prefix_scan(shards, rounds):
    assert scan_rounds(shards) == rounds


def test_a_window_and_a_memory_scale_and_full_softmax_does_not():
    config, tokens = ModelConfig.llama3_2_1b(), 8192
    sizes: dict[str, Any] = {"tokens": tokens, "width": 2}

    def growth(liza: LizaConfig | None) -> tuple[float, float]:
        few, many = (step_cost(config, liza, shards=n, **sizes) for n in (8, 512))
        return many.flops / few.flops, many.exchange.bytes / few.exchange.bytes

    flops, received = growth(LizaConfig(softmax_window=1024))
    assert flops < 1.01
    assert received < 3
    flops, received = growth(None)
    assert flops > 10
    assert received > 60


def test_the_command_writes_table_and_picture(tmp_path, capsys):
    arguments = ["scaling", "--random-weights", "tiny", "--tokens", "64", "--window", "8"]
    arguments += ["--devices", "1", "8", "--output", str(tmp_path), "--json"]
    assert run_command(COMMANDS, arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "scaling.json").read_text())
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    one, eight = report["runs"]["window and memory"]
    assert one["efficiency"] == 1
    assert one["megabytes_per_device"] == 0
    assert 0 < eight["efficiency"] < 1
