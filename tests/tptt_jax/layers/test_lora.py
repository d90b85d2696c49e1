"""Low-rank adapters and the projections that carry them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import quick_jit, randomize
from tptt_jax import CausalLM, LoraConfig, ModelConfig
from tptt_jax.layers.lora import LowRank, Projection, fold_path

IN, OUT, RANK = 6, 10, 3


def _adapter(dropout=0.0, scale=0.7):
    adapter = LowRank(
        IN, OUT, rank=RANK, scale=scale, dropout=dropout, axes=("embed", "heads"), rngs=nnx.Rngs(0)
    )
    return randomize(adapter)


def _projection(lora, *, dtype=jnp.float32, bias=True, path="self_attn.q_proj"):
    projection = Projection(
        IN,
        OUT,
        path=path,
        axes=("embed", "heads"),
        bias=bias,
        lora=lora,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    return randomize(projection)


def _inputs(dtype=jnp.float32, rows=4):
    return jnp.asarray(np.random.default_rng(3).standard_normal((2, rows, IN)), dtype)


def _exact(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [(3, 16.0, False, 16 / 3), (8, 4.0, False, 0.5), (1, 1.0, False, 1.0), (4, 6.0, True, 3.0)],
    ids=str,
)
def test_update_is_the_scaled_product(rank, alpha, rslora, scale):
    projection = _projection(LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora))
    x = _inputs()
    inputs, kernel, bias, a, b = _exact(
        x,
        projection.kernel[...],
        projection.bias[...],
        projection.lora.a[...],
        projection.lora.b[...],
    )
    assert a.shape == (IN, rank)
    want = inputs @ kernel + bias + scale * (inputs @ a @ b)
    assert_allclose(projection(x), want, atol=1e-5)
    without = inputs @ kernel + scale * (inputs @ a @ b)
    assert_allclose(projection(x, use_bias=False), without, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_but_learns():
    lora = LoraConfig(rank=RANK)
    fresh = Projection(
        IN,
        OUT,
        path="q_proj",
        axes=("embed", "heads"),
        lora=lora,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    x = _inputs()
    assert_array_equal(fresh(x), x @ fresh.kernel[...])
    # Uniform within 1 / sqrt(in), as PEFT's Kaiming start.
    a = np.asarray(fresh.lora.a[...])
    assert np.abs(a).max() <= IN**-0.5
    assert a.std() > 0.3 * IN**-0.5

    graphdef, adapters, rest = nnx.split(fresh, nnx.LoRAParam, ...)
    grads = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s, rest)(x) ** 2))(adapters)
    assert np.abs(grads["lora"]["b"][...]).max() > 0


def test_merged_kernel_equals_applying_the_adapter():
    projection, x = _projection(LoraConfig(rank=RANK)), _inputs()
    merged = projection.merged_kernel()
    assert merged.dtype == jnp.float32
    assert_allclose(x @ merged + projection.bias[...], projection(x), atol=1e-5)
    plain = _projection(None)
    assert_array_equal(plain.merged_kernel(), plain.kernel[...])


def test_a_low_precision_base_keeps_a_float32_adapter():
    projection = _projection(LoraConfig(rank=RANK), dtype=jnp.bfloat16)
    assert projection.kernel[...].dtype == projection.bias[...].dtype == jnp.bfloat16
    assert projection.lora.a[...].dtype == projection.lora.b[...].dtype == jnp.float32
    x = _inputs(jnp.bfloat16)
    update = projection.lora(x)
    assert update.dtype == jnp.float32
    inputs, a, b = _exact(x, projection.lora.a[...], projection.lora.b[...])
    # float32 throughout: bfloat16 anywhere would be off by 4e-3.
    assert_allclose(update, inputs @ a @ b * 16 / RANK, rtol=1e-4, atol=1e-5)
    assert projection(x).dtype == jnp.bfloat16
    assert projection.merged_kernel().dtype == jnp.float32


def test_dropout_needs_a_key():
    adapter, x = _adapter(dropout=0.5), _inputs()
    assert_array_equal(adapter(x), adapter(x))
    without = _adapter(dropout=0.0)
    assert_array_equal(adapter(x), without(x))
    assert_array_equal(without(x, jax.random.key(0)), without(x))
    one, again, other = (adapter(x, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_array_equal(one, again)
    assert bool(jnp.any(one != other))


def test_dropout_is_unbiased():
    adapter, x = _adapter(dropout=0.25), _inputs(rows=1)
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = np.asarray(quick_jit(jax.vmap(lambda key: adapter(x, key)))(keys))
    # Twenty thousand draws: five standard errors of the mean.
    error = np.abs(samples.mean(0) - np.asarray(adapter(x)))
    assert (error <= 5 * samples.std(0) / len(keys) ** 0.5 + 1e-6).all()
    dropped = _inputs_seen(adapter, x)
    assert abs(dropped - 0.25) < 0.02


def _inputs_seen(adapter, x):
    """Share of inputs that dropout zeroes, read off with an identity adapter."""
    probe = LowRank(
        IN,
        IN,
        rank=IN,
        scale=1.0,
        dropout=adapter.dropout,
        axes=("embed", "embed"),
        rngs=nnx.Rngs(0),
    )
    probe.a[...], probe.b[...] = jnp.eye(IN), jnp.eye(IN)
    ones = jnp.ones((1000, 1, IN))
    out = np.asarray(probe(ones, jax.random.key(2)))
    assert_allclose(out[out != 0], 1 / (1 - adapter.dropout), rtol=1e-6)
    return np.mean(out == 0)


def test_every_place_drops_other_inputs():
    lora, x = LoraConfig(rank=RANK, dropout=0.5), jnp.ones((1, 50, IN))
    places = [
        _projection(lora, path=f"self_attn.{name}")(x, jax.random.key(0))
        for name in ("q_proj", "k_proj")
    ]
    chex.assert_equal_shape(places)
    assert bool(jnp.any(places[0] != places[1]))
    assert fold_path(None, "self_attn.q_proj") is None


TARGETS = {
    "names": (("q_proj", "down_proj"), {"self_attn.q_proj", "mlp.down_proj"}),
    "regular expression": (
        (r"self_attn\.[qk]_proj",),
        {"self_attn.q_proj", "self_attn.k_proj"},
    ),
    "both": (
        (r"mlp\..*", "o_proj"),
        {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"},
    ),
    "default": (LoraConfig().targets, {f"self_attn.{x}_proj" for x in "qkvo"}),
}


def _abstract_model(targets):
    config = ModelConfig.tiny(tie_embeddings=False)
    lora = LoraConfig(rank=2, targets=targets)
    return nnx.eval_shape(lambda: CausalLM(config, None, lora, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("targets", "want"), TARGETS.values(), ids=TARGETS)
def test_targets_pick_projections(targets, want):
    model = _abstract_model(targets)
    adapted = {
        module.path
        for _, module in nnx.iter_modules(model)
        if isinstance(module, Projection) and module.lora is not None
    }
    assert adapted == want


@pytest.mark.parametrize("target", ["query", r"self_attn\.q", "attn.q_proj", "lm_head"])
def test_a_target_that_matches_nothing_is_an_error(target):
    with pytest.raises(ValueError, match="matches no projection") as error:
        _abstract_model(("q_proj", target))
    message = str(error.value)
    assert repr(target) in message
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
        assert name in message
