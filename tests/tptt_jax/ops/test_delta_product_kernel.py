"""The Pallas kernels: interpreted against the float64 recurrence, and lowered for CUDA."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.tptt_jax.ops.test_delta_product import (
    IDS,
    assert_near,
    cast,
    make_inputs,
    oracle,
    oracle_gradients,
    relative_error,
    weigh,
)
from tptt_jax.ops import chunk_delta_product

kernels = functools.partial(chunk_delta_product, implementation="pallas")
CASES = {
    "plain": {"dim": 16, "value_dim": 16},
    "two-chunks-two-columns": {"length": 70, "steps": 1, "heads": 2, "dim": 128, "value_dim": 128},
    "decay-and-state": {"decay": True, "state": True, "steps": 1, "seed": 1},
    "per-channel": {"vector": True, "state": True, "decay": True, "seed": 1},
    "packed": {"heads": 6, "value_dim": 5, "steps": 3, "state": True, "decay": True, "seed": 2},
    "packed-without-decay": {"heads": 2, "steps": 4, "state": True, "seed": 3},
}


def half_precision(inputs):
    """In bfloat16, but for what is float32 in any model."""
    wide = ("log_decay", "initial_state")
    return {
        key: jnp.asarray(x, jnp.float32 if key in wide else jnp.bfloat16)
        for key, x in inputs.items()
    }


def case(name):
    return make_inputs(**CASES[name]), jnp.asarray(IDS) if "packed" in name else None


@jax.jit
def kernel_gradients(inputs, segment_ids):
    def run(**arguments):
        out, state = kernels(**arguments)
        assert out.dtype == inputs["q"].dtype
        # Weights that are counted in bfloat16 would be others.
        return out.astype(jnp.float32), state

    return jax.grad(lambda x: weigh(run, x, segment_ids), has_aux=True)(inputs)


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient_equal_the_float64_recurrence(name):
    inputs, ids = case(name)
    with jax.enable_x64(True):
        exact = oracle_gradients(cast(inputs, jnp.float64), ids)
        want_gradients, want = jax.tree.map(np.asarray, exact)
    gradients, got = kernel_gradients(cast(inputs), ids)
    assert_near(got, want, 1e-5)
    assert set(gradients) == set(inputs)
    for argument, gradient in gradients.items():
        error = relative_error(gradient, want_gradients[argument])
        assert error < 1e-4, (argument, error)


@pytest.mark.parametrize("name", ["decay-and-state", "packed"])
def test_bfloat16_products_stay_within_one_percent(name):
    """At the default precision running sums of decays stand for the sums in between, too."""
    inputs, ids = case(name)
    half = half_precision(inputs)
    rounded = {key: np.asarray(x, np.float64) for key, x in half.items()}
    with jax.enable_x64(True):
        exact = oracle_gradients(cast(rounded, jnp.float64), ids)
        want_gradients, want = jax.tree.map(np.asarray, exact)
    gradients, got = kernel_gradients(half, ids)
    assert got[1].dtype == jnp.float32
    assert_near(got, want, 1e-2)
    for argument, gradient in gradients.items():
        assert gradient.dtype == half[argument].dtype
        assert relative_error(gradient, want_gradients[argument]) < 2e-2, argument


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_any_length(length):
    inputs = make_inputs(length, steps=1, decay=True, state=True)
    got = jax.jit(kernels)(**cast(inputs))
    assert_near(got, oracle(inputs), 1e-5)


def test_padding_that_is_not_a_number_stays_out():
    inputs, ids = case("packed")
    spoiled = cast(inputs)
    for name in ("q", "k", "v", "beta", "log_decay"):
        x = spoiled[name]
        valid = (ids != 0).reshape(ids.shape + (1,) * (x.ndim - 2))
        spoiled[name] = jnp.where(valid, x, jnp.nan)
    got = jax.jit(kernels)(**spoiled, segment_ids=ids)
    assert_near(got, oracle(inputs, segment_ids=ids), 1e-5)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"steps": 5}, {}),
        ({"dim": 129}, {}),
        ({}, {"state_activation": "gelu"}),
    ],
    ids=["steps", "channels", "activation"],
)
def test_what_the_kernels_do_not_take_is_said(options, arguments):
    inputs = cast(make_inputs(5, **options))
    with pytest.raises(ValueError, match='use implementation="xla"'):
        kernels(**inputs, **arguments)
    chunk_delta_product(**inputs, **arguments)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="xla, pallas or None"):
        chunk_delta_product(**cast(make_inputs(5)), implementation="triton")


@pytest.fixture
def compiled(monkeypatch):
    """Not interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.fixture
def on_gpu(compiled, monkeypatch):
    """As if a GPU were there, to choose a program."""

    def set_capability(capability):
        device = type("Device", (), {"compute_capability": capability})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    set_capability("9.0")
    return set_capability


def lowered_for_cuda(function, *args):
    # Later releases of JAX ask which GPU.
    device = AbstractDevice("NVIDIA H100", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


KERNELS = {
    "systems": 2,
    "states": 2,
    "outputs": 1,
    "grad_solution": 1,
    "states_back": 1,
    "reads_back": 1,
    "writes_back": 1,
}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("vector", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_kernels_pass_the_compiler_for_gpus(compiled, precision, vector):
    """Forward and backward, three query heads a state, documents, decay."""
    options = {"dim": 64, "value_dim": 64, "heads": 6, "decay": True, "state": True}
    inputs = half_precision(make_inputs(40, steps=1, vector=vector, **options))
    ids = jnp.ones(inputs["q"].shape[:2], jnp.int32)

    def loss(inputs):
        out, state = kernels(**inputs, segment_ids=ids, precision=precision)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(state)

    text = lowered_for_cuda(jax.value_and_grad(loss), inputs)
    for name, times in KERNELS.items():
        assert len(re.findall(rf'name = "delta_product_{name}"', text)) == times, name


def test_where_kernels_are_preferred(on_gpu, monkeypatch):
    def calls(inputs, **options):
        text = str(jax.make_jaxpr(functools.partial(chunk_delta_product, **options))(**inputs))
        return text.count("pallas_call")

    monkeypatch.setenv("TPTT_JAX_PALLAS", "1")  # without a trial, which needs a GPU
    inputs = half_precision(make_inputs(40, steps=1, decay=True))
    assert calls(inputs) == 3
    assert calls(inputs, implementation="xla") == 0
    assert calls(inputs, precision="highest") == 0
    assert calls(inputs, state_activation="gelu") == 0
    assert calls(inputs | {"k": inputs["k"].astype(jnp.float32)}) == 0
    wide = make_inputs(40, steps=1, decay=True, dim=256)
    assert calls(half_precision(wide)) == 0
    for capability, expected in (("8.0", 0), ("10.0", 0), ("gfx90a", 0), ("9.0", 3)):
        on_gpu(capability)
        assert calls(inputs) == expected, capability
    monkeypatch.setenv("TPTT_JAX_PALLAS", "0")
    assert calls(inputs) == 0


def test_nothing_is_left_to_kernels_on_a_cpu():
    inputs = half_precision(make_inputs(40, steps=1, decay=True))
    assert "pallas_call" not in str(jax.make_jaxpr(chunk_delta_product)(**inputs))


DIVIDED = """
import functools, sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.tptt_jax.ops.test_delta_product import cast, make_inputs, weigh
from tptt_jax.ops import chunk_delta_product
from tptt_jax.ops.delta_product.trial import KernelKind, kernels_agree
from tptt_jax.sharding import make_mesh

rows, tensor = "data", "tensor"
keys = P(rows, None, None, tensor)
places = {"q": P(rows, None, tensor), "k": keys, "v": keys, "beta": keys,
          "log_decay": P(rows, None, tensor), "initial_state": P(rows, tensor)}
ids = np.repeat([[1, 2], [3, 3]], [30, 40], axis=1)

def gradients(inputs, implementation):
    run = functools.partial(chunk_delta_product, implementation=implementation)
    return jax.grad(lambda x: weigh(run, x, ids), has_aux=True)(inputs)

gradients = jax.jit(gradients, static_argnames="implementation")
mesh = make_mesh("data=2,tensor=2")
for vector, heads, kv_heads in ((True, 4, 2), (False, 2, 2), (False, 4, 1)):
    options = {"heads": heads, "kv_heads": kv_heads, "vector": vector}
    inputs = cast(make_inputs(70, decay=True, state=True, **options))
    if kv_heads == 1:
        places = {name: P(rows) for name in places}
    want = gradients(inputs, "xla")
    put = {name: jax.device_put(x, NamedSharding(mesh, places[name])) for name, x in inputs.items()}
    compiled = gradients.lower(put, "pallas").compile()
    got = compiled(put)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    for name, x in got[0].items():
        assert x.sharding.is_equivalent_to(put[name].sharding, x.ndim), (name, x.sharding)
    moved = [x for x in ("all-gather", "all-to-all", "permute") if x in compiled.as_text()]
    assert not moved, moved
kind = KernelKind(16, 16, 1, 2, "float32", per_channel=False, decay=True, documents=True)
with jax.set_mesh(mesh):
    assert kernels_agree(kind)
print("as on one")
"""


def test_rows_and_heads_are_divided_among_devices():
    """Four simulated devices; nothing travels between them."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DIVIDED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "as on one", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_equal_the_program_of_xla(name):
    inputs, ids = case(name)

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradients(inputs, implementation):
        run = functools.partial(chunk_delta_product, implementation=implementation)
        return jax.grad(lambda x: weigh(run, x, ids), has_aux=True)(inputs)

    got, want = (gradients(cast(inputs), each) for each in ("pallas", "xla"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, np.asarray(b, np.float64)) < 1e-4
    out = kernel_gradients(cast(inputs, jnp.bfloat16), ids)[1][0]
    # The inputs are rounded as well.
    assert relative_error(out, np.asarray(want[1][0], np.float64)) < 3e-2
