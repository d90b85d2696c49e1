"""Blocks of int8, int4 and NF4 against a reference in NumPy; products with quantised matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts import assert_close, random_tokens
from tptt_jax.ops import lm_head
from tptt_jax.ops.cross_entropy import token_cross_entropy
from tptt_jax.ops.distillation import token_divergence
from tptt_jax.ops.grouped_matmul import group_rows, grouped_matmul
from tptt_jax.ops.lm_head import head_product
from tptt_jax.ops.quantization import (
    QuantizedArray,
    are_finite,
    quantize,
    slice_weight,
    stored_shapes,
    take_entry,
    take_weight,
)

# Appendix E of QLoRA (arXiv:2305.14314).
TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
BLOCK = {"int8": 32, "int4": 32, "nf4": 64}
# Of a block's scale: half a step, and what rounding to float16 adds at the block's ends.
BOUND = {
    "int8": 0.5 + 127 * 2**-11,
    "int4": 0.5 + 2 * 15 * 2**-11,
    "nf4": (1 - 0.6961928009986877) / 2 + 2**-11,
}

formats = pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
axes = pytest.mark.parametrize("axis", [-1, -2], ids=["table", "kernel"])


def draw(*shape, seed=0, scale=0.02):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def quantized(x, format, axis):
    codes, scales = quantize(jnp.asarray(x), format, axis)
    return QuantizedArray(codes, scales, format, axis, x.shape[axis])


def half(x):
    """Rounded to float16."""
    return x.astype(np.float16).astype(np.float64)


def reference(x, format, axis):
    """Dequantised values and scales of every value, one block at a time."""
    x = np.moveaxis(x.astype(np.float64), axis, -1)
    out, scales = np.empty_like(x), np.empty_like(x)
    for begin in range(0, x.shape[-1], BLOCK[format]):
        part = (..., slice(begin, begin + BLOCK[format]))
        filled = np.pad(
            x[part], [(0, 0)] * (x.ndim - 1) + [(0, -x[part].shape[-1] % BLOCK[format])]
        )
        largest, least = (each(-1, keepdims=True) for each in (filled.max, filled.min))
        if format == "int4":
            scale = half((largest.astype(np.float32) - least.astype(np.float32)) / np.float32(15))
            found = np.clip(np.round((x[part] - half(least)) / scale), 0, 15)
            out[part] = found * scale + half(least)
        else:
            largest = np.maximum(largest, -least)
            scale = half(largest.astype(np.float32) / np.float32(127 if format == "int8" else 1))
            relative = x[part] / scale
            if format == "int8":
                found = np.clip(np.round(relative), -127, 127)
            else:
                found = TABLE[np.abs(relative[..., None] - TABLE).argmin(-1)]
            out[part] = found * scale
        scales[part] = np.broadcast_to(scale, x[part].shape)
    return np.moveaxis(out, -1, axis), np.moveaxis(scales, -1, axis)


@formats
@axes
def test_values_are_those_of_the_reference(format, axis):
    x = draw(2, 70, 130)  # neither divides into blocks
    expected, scales = reference(x, format, axis)
    codes, own_scales = quantize(x, format, axis)
    assert (codes.shape, own_scales.shape) == stored_shapes(x.shape, format, axis)
    found = quantized(x, format, axis)
    assert found.shape == x.shape
    np.testing.assert_array_equal(codes, found.codes)
    np.testing.assert_array_equal(own_scales, found.scales)
    values = np.asarray(found.dequantize(), np.float64)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-12)
    assert (np.abs(values - x) <= BOUND[format] * scales).all()
    # Of normal values NF4 and int4 lose a tenth, int8 half a percent.
    lost = np.linalg.norm(values - x) / np.linalg.norm(x)
    assert lost < {"int8": 0.006, "int4": 0.1, "nf4": 0.1}[format]


def test_known_bytes_of_nf4():
    block = np.tile(TABLE.astype(np.float32), 4) * 0.5
    codes, scales = quantize(block[None], "nf4", -1)
    # The first half of the block is in the low bits; both halves run through the table twice.
    expected = [index | index << 4 for index in [*range(16)] * 2]
    assert codes.tolist() == [[expected]]
    assert scales.tolist() == [[0.5]]
    values = QuantizedArray(jnp.asarray(codes), jnp.asarray(scales), "nf4", -1, 64).dequantize()
    np.testing.assert_array_equal(values[0], block)


def test_blocks_of_ggufs_q8_0_stay_as_they_are():
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (5, 3, 32)).astype(np.int8)
    codes[..., 0] = 127
    scales = (2.0 ** rng.uniform(-14, 3, (5, 3))).astype(np.float16)
    values = codes.astype(np.float32) * scales.astype(np.float32)[..., None]
    found = quantize(values.reshape(5, 96), "int8", -1)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], scales)


@axes
def test_blocks_of_ggufs_q4_1_stay_as_they_are(axis):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (5, 3, 32))
    codes[..., 4], codes[..., 9] = 0, 15
    step, least = ((2.0 ** rng.uniform(-12, 3, (2, 5, 3, 1))) * [[[[1]]], [[[-7]]]]).astype(
        np.float16
    )
    values = (codes * step.astype(np.float32) + least.astype(np.float32)).reshape(5, 96)
    matrix = values if axis == -1 else values.T
    # Fused, the sum is rounded once and not twice.
    found = quantized(matrix, "int4", axis).dequantize()
    np.testing.assert_allclose(found, matrix, rtol=1e-6, atol=1e-6)
    packed, pair = quantize(values, "int4", -1)
    np.testing.assert_array_equal(packed & 15, codes[..., :16])
    np.testing.assert_array_equal(packed >> 4, codes[..., 16:])
    numbers = pair.view(np.float16).reshape(5, 3, 2)  # little-endian: the low half comes first
    np.testing.assert_array_equal(numbers, np.concatenate([step, least], axis=-1))


@formats
def test_zeros_tiny_and_invalid_values(format):
    x = np.zeros((4, 128), np.float32)
    x[1], x[2, 5], x[3, 100] = 1e-6, np.nan, 1e9
    codes, scales = quantize(x, format, -1)
    values = np.asarray(quantized(x, format, -1).dequantize())
    assert not values[0].any()
    # Half of float16's smallest step, at the largest code.
    largest = {"int8": 127, "int4": 16, "nf4": 1}[format]
    assert np.abs(values[1] - x[1]).max() <= largest * 2**-25
    # Loading refuses a tensor whose scales are not finite.
    found = [are_finite(scales[rows], format) for rows in (slice(2), 2, 3)]
    assert found == [True, False, False]
    assert codes.dtype == (np.int8 if format == "int8" else np.uint8)


@axes
def test_parts_of_a_matrix(axis):
    matrix = quantized(draw(64, 96), "nf4", axis)
    whole, other = matrix.dequantize(), 0 if axis == -1 else 1
    part = slice_weight(matrix, 5, 7, other).dequantize()
    np.testing.assert_array_equal(part, jax.lax.slice_in_dim(whole, 5, 12, axis=other))
    some = jnp.array([3, 60, 3])
    taken = take_weight(matrix, some, other).dequantize()
    np.testing.assert_array_equal(taken, jnp.take(whole, some, other))
    stack = quantized(draw(3, 64, 96), "nf4", axis)
    one = take_entry(stack, jnp.array(1))
    np.testing.assert_array_equal(one.dequantize(), stack.dequantize()[1])


@axes
def test_losses_with_a_quantised_head_are_those_of_a_dense_one(axis, monkeypatch):
    # Blocks of 8 entries, the last of which overlaps.
    monkeypatch.setattr(lm_head, "DENSE_AT_A_TIME", 8 * 32)
    vocab_axis = 0 if axis == -1 else 1
    x = draw(97, 32, scale=0.3)
    head = quantized(x if axis == -1 else x.T, "int8", axis)
    hidden, teacher = (jnp.asarray(draw(2, 5, 32, seed=i, scale=1.0)) for i in (1, 2))
    tokens = jnp.asarray(random_tokens((2, 5)))

    def measure(head):
        def loss(hidden):
            nats = token_cross_entropy(hidden, head, tokens, vocab_axis=vocab_axis)
            apart = token_divergence(hidden, teacher, head, vocab_axis=vocab_axis)
            return jnp.sum(nats + apart)

        return (head_product(hidden, head, vocab_axis), *jax.value_and_grad(loss)(hidden))

    for found, expected in zip(measure(head), measure(head.dequantize()), strict=True):
        assert_close(found, expected, 2e-6, "quantised head")


def test_experts_are_multiplied_as_dense_ones():
    experts = quantized(draw(3, 64, 6), "nf4", -2)
    x, of_row = jnp.asarray(draw(11, 64, scale=1.0)), jnp.asarray(np.arange(11) % 2 * 2)

    def measure(weights):
        def total(x):
            return jnp.sum(jnp.sin(grouped_matmul(x, weights, group_rows(of_row, 3))))

        return jax.value_and_grad(total)(x)

    for found, expected in zip(measure(experts), measure(experts.dequantize()), strict=True):
        assert_close(found, expected, 1e-6, "quantised experts")
