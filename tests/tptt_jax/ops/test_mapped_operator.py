"""The operator under `jax.vmap` and a checked `jax.shard_map`, on two devices of this machine."""

import pytest

from tests.devices import run_on_devices

# Prints one line of errors per way; it runs apart, as devices are counted when JAX starts.
PROGRAM = """
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from tptt_jax.ops.delta_product import chunk_delta_product
from tptt_jax.ops.delta_product.naive import naive_delta_product

assert jax.device_count() == 2
rng = np.random.default_rng(0)
k = rng.standard_normal((2, 9, 2, 2, 16))
inputs = {
    "q": rng.standard_normal((2, 9, 2, 16)),
    "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
    "v": rng.standard_normal(k.shape),
    "beta": rng.uniform(size=(2, 9, 2, 2)),
    "log_decay": -rng.uniform(size=(2, 9, 2)),
}
inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
ids = jnp.asarray([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2], jnp.int32)
mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))

def results(run, inputs, ids):
    def loss(inputs):
        out, state = run(inputs, ids)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state)), (out, state)
    (_, outs), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return outs, gradients

def by(implementation):
    return lambda inputs, ids: chunk_delta_product(
        **inputs, segment_ids=ids, chunk_size=4, implementation=implementation
    )

def naive(inputs, ids):
    return naive_delta_product(**inputs, segment_ids=ids)

def shard(run, check):
    specs = (P("rows"), P("rows"))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("rows"), check_vma=check)

def report(name, got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    print(name, max(float(jnp.abs(a - b).max()) for a, b in pairs), flush=True)

want = jax.jit(lambda *x: results(naive, *x))(inputs, ids)
for name, run in (("naive", naive), ("chunks", by(None))):
    report(f"checked {name}", jax.jit(lambda *x: results(shard(run, True), *x))(inputs, ids), want)
kernels = shard(by("pallas"), False)
report("unchecked kernels", jax.jit(lambda *x: results(kernels, *x))(inputs, ids), want)
try:
    shard(by("pallas"), True)(inputs, ids)
except ValueError as error:
    print("refused", error)
# A mapped axis on some arrays only.
twice = {name: jnp.stack([x, x[::-1]]) for name, x in inputs.items()}
both = jnp.stack([ids, ids[::-1]])
turned = jax.tree.map(lambda x: x[::-1], want)
for implementation in (None, "pallas"):
    mapped = jax.jit(jax.vmap(jax.jit(lambda *x: results(by(implementation), *x))))(twice, both)
    report(f"mapped {implementation}", mapped, jax.tree.map(lambda *x: jnp.stack(x), want, turned))
part = jax.jit(jax.vmap(lambda q: by("pallas")(inputs | {"q": q}, ids)))(twice["q"])
report("mapped queries", jax.tree.map(lambda x: x[0], part), want[0])
"""


@pytest.fixture(scope="module")
def lines(project_dir):
    printed = run_on_devices(2, PROGRAM, project_dir)
    return dict(line.rsplit(" ", 1) for line in printed.splitlines())


@pytest.mark.parametrize(
    "way",
    [
        *("checked naive", "checked chunks", "unchecked kernels"),
        *("mapped None", "mapped pallas", "mapped queries"),
    ],
)
def test_values_and_gradients_are_those_of_one_device(lines, way):
    assert float(lines[way]) < 2e-5


def test_kernels_under_a_checked_map_are_refused(lines):
    (message,) = (line for line in lines if line.startswith("refused"))
    assert "check_vma=False or" in message
