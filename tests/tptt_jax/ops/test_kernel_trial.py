"""The kernels are tried against XLA's program before they are taken; interpreted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tptt_jax.ops.test_delta_product import cast, make_inputs
from tptt_jax.ops import chunk_delta_product, delta_product_plan, kernel_trial
from tptt_jax.ops.kernel_trial import KernelKind, kernels_agree
from tptt_jax.sharding import make_mesh

PLAIN = KernelKind(16, 16, 1, 1, per_channel=False, decay=False, documents=False)
KINDS = {
    "plain": PLAIN,
    "all": KernelKind(16, 16, 3, 2, per_channel=True, decay=True, documents=True),
    "odd-channels": KernelKind(5, 24, 2, 3, per_channel=False, decay=True, documents=False),
}


@pytest.fixture(autouse=True)
def untried():
    kernels_agree.cache_clear()
    yield
    kernels_agree.cache_clear()
    # What a test has broken was traced.
    jax.clear_caches()


@pytest.fixture
def on_hopper(monkeypatch):
    """A GPU that runs kernels as an interpreter does."""
    monkeypatch.setattr(delta_product_plan, "compute_capability", lambda: (9, 0))


def break_kernels(monkeypatch, spoil):
    """Lets `spoil` have the arguments before the kernels get them."""

    def broken(*, implementation, **arguments):
        if implementation == "pallas":
            arguments = spoil(**arguments)
        return chunk_delta_product(implementation=implementation, **arguments)

    monkeypatch.setattr(kernel_trial, "chunk_delta_product", broken)


@pytest.mark.parametrize("name", KINDS)
def test_kernels_agree_with_the_program_of_xla(name):
    kind = KINDS[name]
    errors = kernel_trial._compare(kind)
    names = ["beta", "initial_state", "k", *(["log_decay"] if kind.decay else []), "q", "v"]
    assert list(errors) == [
        *(f"the gradient of {name}" for name in names),
        "the output",
        "the state",
    ]
    # Rounded to bfloat16, so neither the same nor far away.
    assert all(1e-4 < error < 2e-2 for error in errors.values()), errors
    assert kernels_agree(kind)


@pytest.mark.filterwarnings("error")
def test_one_trial_a_kind(monkeypatch):
    assert kernels_agree(PLAIN)
    monkeypatch.setattr(kernel_trial, "_compare", None)
    assert kernels_agree(PLAIN)


def test_a_wrong_output_is_said(monkeypatch):
    break_kernels(monkeypatch, lambda q, **rest: {"q": q.at[:, 70].set(-9 * q[:, 70]), **rest})
    with pytest.warns(UserWarning, match=r"kernels .* fail .*the output differs by \d+.*%"):
        assert not kernels_agree(PLAIN)


def test_a_wrong_gradient_alone_is_said(monkeypatch):
    def stop(k, **rest):
        return {"k": k.at[:, 64:].set(jax.lax.stop_gradient(k[:, 64:])), **rest}

    break_kernels(monkeypatch, stop)
    alone = r"\(the gradient of k differs by [\d.]+%\).*TPTT_JAX_PALLAS=0"
    with pytest.warns(UserWarning, match=alone):
        assert not kernels_agree(PLAIN)


def test_nan_is_no_agreement(monkeypatch):
    break_kernels(monkeypatch, lambda v, **rest: {"v": v * jnp.nan, **rest})
    with pytest.warns(UserWarning, match="the output differs by nan%"):
        assert not kernels_agree(PLAIN)


def test_kernels_that_do_not_compile_are_no_error(monkeypatch):
    """Pallas refuses to compile for a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(UserWarning, match="ValueError: Only interpret mode is supported on CPU"):
        assert not kernels_agree(PLAIN)


def half_precision(**options):
    inputs = cast(make_inputs(40, steps=1, dim=16, value_dim=16, **options), jnp.bfloat16)
    return {
        name: x.astype(jnp.float32) if name in ("log_decay", "initial_state") else x
        for name, x in inputs.items()
    }


def traced(inputs, **arguments):
    return str(jax.make_jaxpr(lambda x: chunk_delta_product(**x, **arguments))(inputs))


def test_the_operator_takes_kernels_that_were_tried(on_hopper):
    """In the middle of a trace, with a mesh, precisions and a loop around it."""
    inputs = half_precision(decay=True)

    @jax.jit
    def loop(inputs):
        def body(carry, _):
            return carry + chunk_delta_product(**inputs)[0].astype(jnp.float32), None

        zeros = jnp.zeros(inputs["q"].shape, jnp.float32)
        return jax.lax.scan(jax.checkpoint(body), zeros, length=1)[0]

    with (
        jax.set_mesh(make_mesh("data=1")),
        jax.default_matmul_precision("highest"),
        jax.enable_x64(True),
        jax.debug_nans(True),
    ):
        assert str(jax.make_jaxpr(loop)(inputs)).count("pallas_call") == 3
        got = loop(inputs)
    want = chunk_delta_product(**inputs, implementation="xla")[0]
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())
    assert kernels_agree.cache_info().misses == 1


def test_the_operator_leaves_kernels_that_fail(on_hopper, monkeypatch):
    break_kernels(monkeypatch, lambda q, **rest: {"q": 2 * q, **rest})
    with pytest.warns(UserWarning, match="so XLA's program is taken"):
        assert "pallas_call" not in traced(half_precision())
    monkeypatch.setenv("TPTT_JAX_PALLAS", "1")
    assert "pallas_call" in traced(half_precision())


def test_each_kind_has_its_own_trial(on_hopper, monkeypatch):
    tried = []
    monkeypatch.setattr(kernel_trial, "kernels_agree", lambda kind: tried.append(kind) or True)
    ids = jnp.ones((2, 40), jnp.int32)
    for options, arguments in (
        ({}, {}),
        ({"decay": True, "heads": 6}, {"segment_ids": ids}),
        ({"vector": True}, {}),
    ):
        traced(half_precision(**options), **arguments)
    assert [each[3:] for each in tried] == [
        (2, False, False, False),
        (3, False, True, True),
        (2, True, False, False),
    ]
    assert all(each[:3] == (16, 16, 1) for each in tried)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dim", [64, 128])
def test_compiled_kernels_agree(dim):
    kind = KernelKind(dim, dim, 2, 4, per_channel=False, decay=True, documents=True)
    assert all(error < 1e-2 for error in kernel_trial._compare(kind).values())
