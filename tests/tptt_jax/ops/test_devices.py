"""Choices that depend on the device: by arrays, by the default device, by what is compiled for."""

import jax
import jax.numpy as jnp
import pytest

from tptt_jax.ops.cross_entropy import token_cross_entropy
from tptt_jax.ops.devices import PerPlatform, compute_capability, platform_of, run_per_platform
from tptt_jax.ops.distillation import token_divergence


def test_arrays_know_their_device_whatever_the_default(monkeypatch):
    x = jnp.zeros(3)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform_of(None, x) == "cpu"
    assert compute_capability(x) is None
    traced = []
    jax.eval_shape(lambda x: traced.append(platform_of(x)), x)
    with jax.default_device(jax.devices("cpu")[0]):
        jax.eval_shape(lambda x: traced.append(platform_of(x)) or x, x)
    assert traced == ["gpu", "cpu"]


def test_one_value_for_each_platform():
    setting = PerPlatform(cpu=2.0, other=3.0)

    def run(x):
        return run_per_platform(lambda value, x: value * x, setting, x)

    assert run(jnp.ones(())) == jax.jit(run)(jnp.ones(())) == 2
    lowered = jax.jit(run).trace(jnp.ones(())).lower(lowering_platforms=("cuda",)).as_text()
    assert "3.0" in lowered
    assert "2.0" not in lowered


@pytest.mark.parametrize(
    "loss",
    [
        lambda hidden, head: token_cross_entropy(hidden, head, jnp.zeros((2, 64), int)),
        lambda hidden, head: token_divergence(hidden, 2 * hidden, head),
    ],
    ids=["cross-entropy", "divergence"],
)
def test_losses_have_the_blocks_of_the_platform_they_are_compiled_for(loss):
    """On CPU blocks of the vocabulary that stay in the cache, elsewhere all of it at once."""
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 64, 8), (70000, 8)))
    traced = jax.jit(jax.grad(lambda *x: loss(*x).sum())).trace(hidden, head)
    whole = {
        platform: "x70000xf32" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert whole == {"cpu": False, "cuda": True}
