"""The memory's learned gates: initial values and bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import quick_jit, randomize
from tptt_jax import LizaConfig
from tptt_jax.layers.gates import MassGate, ReadScale, WriteGates
from tptt_jax.layers.memory import DeltaMemory
from tptt_jax.layers.parameters import MagParam, MemoryParam

HEADS, KV_HEADS, DIM = 4, 2, 8


def _half_lives(gates, z):
    keep = jax.nn.sigmoid(gates(z).keep)
    return np.log(0.5) / np.log(np.asarray(keep, np.float64))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_write_gates_start_at_one_half_and_half_lives_are_spread(kv_heads):
    gates = WriteGates(LizaConfig(), kv_heads, DIM)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 2 * kv_heads * DIM)))
    logits = gates(z)
    assert logits.beta.shape == (2, 5, 1, kv_heads)
    assert_array_equal(jax.nn.sigmoid(logits.beta), np.full(logits.beta.shape, 0.5))
    want = np.log(0.5) / np.log(1 / (1 + np.exp(-np.linspace(4, 6, kv_heads))))
    if kv_heads == 1:
        want = np.log(0.5) / np.log(1 / (1 + np.exp(-5.0)))
    assert_allclose(_half_lives(gates, z), np.broadcast_to(want, (2, 5, kv_heads)), rtol=1e-3)


def test_only_gates_that_are_projected_have_parameters():
    def names(**options):
        memory = DeltaMemory(
            16, HEADS, KV_HEADS, DIM, LizaConfig(memory_rank=0, **options), rngs=nnx.Rngs(0)
        )
        return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(memory))}

    scale = {"scale.weight", "scale.bias"}
    beta, keep = ({f"gates.{name}.{x}" for x in ("kernel", "bias")} for name in ("beta", "keep"))
    assert names() == scale | beta | keep
    assert names(operator="delta_rule") == scale | beta
    assert names(beta_gate="k") == scale | keep
    assert names(beta_gate="k", alpha_gate="v", linear_scale="unit") == set()


def test_every_step_has_a_write_gate_of_its_own():
    gates = randomize(WriteGates(LizaConfig(operator="delta_product_c"), KV_HEADS, DIM))
    z = np.random.default_rng(0).standard_normal((1, 3, 2 * KV_HEADS * DIM)).astype(np.float32)
    logits = gates(z)
    assert logits.keep is None
    kernel, bias = np.asarray(gates.beta.kernel[...]), np.asarray(gates.beta.bias[...])
    assert_allclose(logits.beta, (z @ kernel + bias).reshape(1, 3, 2, KV_HEADS), rtol=1e-4)


def test_read_scales_start_at_one_and_are_bounded():
    scale = ReadScale(HEADS, DIM)
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, HEADS, DIM)), jnp.float32)
    assert_array_equal(scale(q), np.ones((2, 5, HEADS, 1)))
    scale.weight[...] = 100 * jnp.ones((HEADS, DIM))
    got = np.asarray(scale(q))
    assert_allclose([got.min(), got.max()], np.exp([-4.0, 4.0]), rtol=1e-5)


def _mass_inputs():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 5, HEADS, DIM)).astype(np.float32)
    return (
        q,
        rng.standard_normal((2, 5, HEADS)).astype(np.float32),
        np.array([[0, 0, 1, 2, 30]] * 2),
    )


def test_mass_shares_are_those_of_the_formula():
    gate, (q, log_mass, held) = randomize(MassGate(HEADS, DIM)), _mass_inputs()
    gate.limit[...] = jnp.log(jnp.array([1.5, 20.0, 40.0, 1e9])[:HEADS])
    got = np.asarray(gate(q, log_mass, held))
    weight, slope, bias, limit = (
        np.asarray(x[...], np.float64) for x in (gate.weight, gate.slope, gate.bias, gate.limit)
    )
    log_n = np.minimum(np.log(np.maximum(held, 1))[..., None], limit)
    out = (q * weight).sum(-1) + slope * log_n + bias
    want = 1 / (1 + np.exp(log_mass - out))
    want[held == 0] = 0
    assert_allclose(got, want[..., None], rtol=1e-5)


def test_a_memory_that_nobody_fitted_is_quiet():
    """As many tokens in the window as evicted ones, all with weight 1: half the mass is lost."""
    gate, (q, _, _) = MassGate(HEADS, DIM), _mass_inputs()
    share = gate(q, jnp.full(q.shape[:3], np.log(32)), jnp.full(q.shape[:2], 32))
    assert_allclose(share, np.full((*q.shape[:3], 1), 1 / (1 + np.exp(4.0))), rtol=1e-5)


def test_no_more_tokens_count_than_were_seen():
    gate, (q, log_mass, _) = randomize(MassGate(HEADS, DIM)), _mass_inputs()
    gate.limit[...] = jnp.log(jnp.full(HEADS, 100.0))
    held = [jnp.full(q.shape[:2], n) for n in (99, 100, 5000)]
    few, most, many = (np.asarray(gate(q, log_mass, n)) for n in held)
    assert_array_equal(most, many)
    assert (few != most).all()


def test_mass_gates_are_finite_where_nothing_is_seen():
    gate, (q, log_mass, held) = randomize(MassGate(HEADS, DIM)), _mass_inputs()
    graphdef, state = nnx.split(gate)

    def total(state, q, log_mass):
        return jnp.sum(nnx.merge(graphdef, state)(q, log_mass, held))

    # Padding: the log of no mass at all.
    log_mass[:, 3] = -5e29
    gradients = quick_jit(jax.grad(total, (0, 1, 2)))(state, q, log_mass)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
    assert not np.asarray(gradients[1])[:, :2].any()
    assert not np.asarray(gradients[2])[:, :2].any()
    assert np.asarray(gradients[1])[:, 4].all()


def test_gates_stay_float32_in_a_model_of_half_precision():
    memory = DeltaMemory(16, HEADS, KV_HEADS, DIM, LizaConfig(), rngs=nnx.Rngs(0))
    gate = MassGate(HEADS, DIM)
    for module in (memory, gate):
        for _, variable in nnx.to_flat_state(nnx.state(module)):
            assert variable.get_value().dtype == jnp.float32
            assert isinstance(variable, MemoryParam)
    assert all(isinstance(x, MagParam) for x in (gate.weight, gate.slope, gate.bias, gate.limit))
    q = jnp.ones((1, 2, HEADS, DIM), jnp.bfloat16)
    assert memory.scale(q).dtype == jnp.float32
    assert memory.gates(q.reshape(1, 2, -1)).keep.dtype == jnp.float32
    assert gate(q, jnp.zeros((1, 2, HEADS)), jnp.ones((1, 2), int)).dtype == jnp.float32
