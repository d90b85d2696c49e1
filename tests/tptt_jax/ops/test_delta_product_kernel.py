"""The Pallas kernels: interpreted against the float64 recurrence, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    half = {
        key: jnp.asarray(x, jnp.float32 if key in ("log_decay", "initial_state") else jnp.bfloat16)
        for key, x in inputs.items()
    }
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
