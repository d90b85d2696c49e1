"""Rotary embedding against float64 numpy and formulas written out again."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from tests.contracts import quick_jit
from tptt_jax.config import RopeConfig
from tptt_jax.ops.attention import rope
from tptt_jax.ops.attention.rope import RotaryAngles, rotary_angles, rotary_frequencies
from tptt_jax.ops.documents import document_lengths

HEAD_DIM = 64
CONFIGS = {
    "llama": RopeConfig(),
    "gemma": RopeConfig(theta=1e6, scaling="linear", factor=8.0),
    "llama3": RopeConfig(theta=5e5, scaling="llama3", factor=32.0),
}
angles_of = quick_jit(rotary_angles, static_argnums=(1, 2))
rotate = quick_jit(rope.rotate)


def _plain_frequencies(theta, head_dim):
    return np.array([1.0 / theta ** (2 * i / head_dim) for i in range(head_dim // 2)])


def _llama3_frequencies(config, head_dim):
    """Meta's release, as in transformers' _compute_llama3_parameters: one channel at a time."""
    out = []
    for frequency in _plain_frequencies(config.theta, head_dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < config.original_max_positions / config.high_freq_factor:
            out.append(frequency)
        elif wavelength > config.original_max_positions / config.low_freq_factor:
            out.append(frequency / config.factor)
        else:
            smooth = config.original_max_positions / wavelength - config.low_freq_factor
            smooth /= config.high_freq_factor - config.low_freq_factor
            out.append((1 - smooth) * frequency / config.factor + smooth * frequency)
    return np.array(out)


@pytest.mark.parametrize(
    ("theta", "head_dim"), [(1e4, 64), (1e5, 64), (1e6, 256), (5e5, 2)], ids=str
)
def test_plain_and_linear_frequencies(theta, head_dim):
    want = _plain_frequencies(theta, head_dim)
    assert_allclose(rotary_frequencies(RopeConfig(theta=theta), head_dim), want, rtol=1e-14)
    stretched = RopeConfig(theta=theta, scaling="linear", factor=8.0)
    assert_allclose(rotary_frequencies(stretched, head_dim), want / 8, rtol=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(theta=5e5, scaling="llama3", factor=8.0),
        RopeConfig(theta=5e5, scaling="llama3", factor=32.0),
        RopeConfig(
            theta=1e4,
            scaling="llama3",
            factor=3.0,
            low_freq_factor=2.0,
            high_freq_factor=16.0,
            original_max_positions=1000,
        ),
    ],
    ids=["llama 3.1", "llama 3.2", "odd"],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_frequencies(config, head_dim):
    got, want = rotary_frequencies(config, head_dim), _llama3_frequencies(config, head_dim)
    assert_allclose(got, want, rtol=1e-12)
    # All three branches are there: kept, stretched and in between.
    ratio = got / _plain_frequencies(config.theta, head_dim)
    assert np.isclose(ratio, 1).any()
    assert np.isclose(ratio, 1 / config.factor).any()
    assert ((ratio > 1.01 / config.factor) & (ratio < 0.99)).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_angles_are_exact_at_any_position(name):
    config = CONFIGS[name]
    spread = np.random.default_rng(0).integers(0, 2**31, 500)
    edges = [
        0,
        1,
        255,
        256,
        257,
        65_535,
        65_536,
        65_537,
        999_999,
        1_000_000,
        2**24 - 1,
        2**24,
        2**31 - 1,
    ]
    positions = np.concatenate([edges, spread])[None]
    frequencies = {
        "llama": _plain_frequencies(config.theta, HEAD_DIM),
        "gemma": _plain_frequencies(config.theta, HEAD_DIM) / config.factor,
        "llama3": _llama3_frequencies(config, HEAD_DIM),
    }[name]
    exact = positions[..., None].astype(np.float64) * frequencies
    got = angles_of(jnp.asarray(positions, jnp.int32), config, HEAD_DIM)
    assert got.cos.dtype == got.sin.dtype == jnp.float32
    cos, sin = np.cos(exact), np.sin(exact)
    wanted = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)
    for values, want in zip(got, wanted, strict=True):
        assert np.abs(np.asarray(values, np.float64) - want).max() < 1e-5


def _heads(seed, heads=3, dim=HEAD_DIM):
    return np.random.default_rng(seed).standard_normal((1, 4, heads, dim)).astype(np.float32)


def test_rotation_is_half_split_complex_multiplication():
    x, positions = _heads(0), np.array([[0, 3, 17, 1000]])
    angle = positions[..., None] * _plain_frequencies(1e4, HEAD_DIM)
    turned = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angle)[:, :, None]
    got = rotate(jnp.asarray(x), angles_of(jnp.asarray(positions), RopeConfig(), HEAD_DIM))
    assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


@settings(deadline=None)  # the first example compiles
@given(st.integers(0, 2**31 - 1001), st.integers(0, 1000))
@example(2**31 - 1001, 1000)
def test_logits_depend_on_the_distance_only(start, distance):
    q, k = _heads(1)[:, :1], _heads(2)[:, :1]

    def logits(key_position):
        positions = jnp.asarray([[key_position]]), jnp.asarray([[key_position + distance]])
        key, query = (angles_of(p, CONFIGS["llama"], HEAD_DIM) for p in positions)
        dot = np.asarray(rotate(jnp.asarray(q), query)) * np.asarray(rotate(jnp.asarray(k), key))
        return dot.sum(-1)

    assert_allclose(logits(start), logits(0), atol=2e-4)


def test_low_precision_inputs_are_rotated_in_float32():
    x = jnp.asarray(_heads(3), jnp.bfloat16)
    angles = angles_of(jnp.asarray([[5, 700, 3000, 9]]), RopeConfig(), HEAD_DIM)
    got, want = rotate(x, angles), rotate(x.astype(jnp.float32), angles)
    assert got.dtype == jnp.bfloat16
    assert bool(jnp.all(got == want.astype(jnp.bfloat16)))


def test_rotation_has_an_inverse_and_keeps_lengths():
    x = jnp.asarray(_heads(4))
    angles = angles_of(jnp.asarray([[1, 20, 300, 4000]]), RopeConfig(), HEAD_DIM)
    turned = rotate(x, angles)
    assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    back = rotate(turned, jax.tree.map(lambda x: x, RotaryAngles(angles.cos, -angles.sin)))
    assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_the_rotation_back(dtype):
    x, weights = jnp.asarray(_heads(5), dtype), jnp.asarray(_heads(6), dtype)
    angles = angles_of(jnp.asarray([[2, 30, 400, 5000]]), RopeConfig(), HEAD_DIM)

    def loss(x):
        return jnp.sum((rope.rotate(x, angles) * weights).astype(jnp.float32))

    def by_halves(x):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = angles.cos[:, :, None, :32], angles.sin[:, :, None, 32:]
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return jnp.sum(turned * weights.astype(jnp.float32))

    got, want = jax.grad(loss)(x), jax.grad(by_halves)(x)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=tolerance)


LENGTHS = {
    "dynamic": RopeConfig(theta=1e4, scaling="dynamic", factor=3.0, original_max_positions=16),
    "longrope": RopeConfig(
        **{"scaling": "longrope", "factor": 4.0, "original_max_positions": 16},
        short_factor=tuple(np.linspace(1, 2, 32).tolist()),
        long_factor=tuple(np.linspace(1, 30, 32).tolist()),
    ),
}


@pytest.mark.parametrize("config", LENGTHS.values(), ids=LENGTHS)
def test_every_document_has_the_frequencies_of_its_length(config):
    """Three documents and padding in one row: 10, 17 and 300 tokens."""
    counts = (10, 17, 300)
    ids = np.repeat([1, 2, 3, 0], (*counts, 5))[None]
    positions = np.concatenate([*map(np.arange, counts), np.zeros(5, int)])[None]
    lengths = document_lengths(jnp.asarray(positions), jnp.asarray(ids))
    assert lengths[0, :-5].tolist() == np.repeat(counts, counts).tolist()
    got = rotary_angles(jnp.asarray(positions), config, HEAD_DIM, lengths)
    for number, count in enumerate(counts, 1):
        fixed = config.at_length(count, HEAD_DIM)
        want = angles_of(jnp.arange(count)[None], fixed, HEAD_DIM)
        for have, wanted in zip(got, want, strict=True):
            assert_allclose(have[:, ids[0] == number], wanted, atol=1e-4)
    alone = document_lengths(jnp.asarray([[3, 4, 9], [0, 1, 2]]), None)
    assert alone.tolist() == [[10] * 3, [3] * 3]


def test_the_rotation_back_takes_the_factor_out():
    config = RopeConfig(scaling="yarn", factor=8.0, original_max_positions=64)
    assert config.attention_scale == pytest.approx(1 + 0.1 * math.log(8))
    x, angles = jnp.asarray(_heads(7)), angles_of(jnp.asarray([[3, 40, 500, 9]]), config, HEAD_DIM)
    turned = rotate(x, angles)
    factor = jnp.linalg.norm(turned, axis=-1) / jnp.linalg.norm(x, axis=-1)
    assert_allclose(factor, config.attention_scale, rtol=1e-5)
    assert_allclose(rotate(turned, rope.invert_rotation(angles, config)), x, atol=1e-5)
