"""Matrices are quantised while they are read, and nothing else is."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import ConversionError, load_pretrained, quantizing
from convert.quantizing import quantize_tensor, quantized_weights
from tptt_jax import LoraConfig
from tptt_jax.layers.parameters import BaseParam
from tptt_jax.layers.quantized import QuantizedWeight
from tptt_jax.ops.quantization import quantize


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
@pytest.mark.parametrize(("axis", "shape"), [(-1, (70, 96)), (-2, (96, 70)), (-2, (3, 96, 70))])
def test_a_tensor_in_parts_is_the_same(monkeypatch, format, axis, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight = nnx.eval_shape(
        lambda: QuantizedWeight(BaseParam(jnp.zeros(shape), axes=("embed", "mlp")), format, axis)
    )
    monkeypatch.setattr(quantizing, "_ELEMENTS_AT_ONCE", 1000)
    # As it is read: rows of outputs.
    stored = np.asfortranarray(values)
    for found, expected in zip(
        quantize_tensor(stored, weight), quantize(values, format, axis), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("base_dtype", ["int8", "int4", "nf4"])
def test_a_model_has_the_codes_of_its_weights(tiny_model_dir, base_dtype):
    plain = load_pretrained(tiny_model_dir, lora=LoraConfig(rank=2))
    model = load_pretrained(tiny_model_dir, lora=LoraConfig(rank=2), base_dtype=base_dtype)
    assert model.base_dtype == base_dtype
    values = {".".join(map(str, p)): x for p, x in nnx.to_flat_state(nnx.state(plain))}
    own = {".".join(map(str, p)): x for p, x in nnx.to_flat_state(nnx.state(model))}
    weights = quantized_weights(model)
    # Seven matrices of the layers, and the embedding.
    assert len(weights) == 8
    assert own.keys() & values.keys() == values.keys() - weights.keys()
    for name, weight in weights.items():
        assert weight.format == ("int8" if name == "embed.embedding" else base_dtype)
        expected = quantize(np.asarray(values[name].get_value()), weight.format, weight.axis)
        np.testing.assert_array_equal(own[f"{name}.codes"].get_value(), expected[0])
        np.testing.assert_array_equal(own[f"{name}.scales"].get_value(), expected[1])
    for name in own.keys() & values.keys():
        np.testing.assert_array_equal(own[name].get_value(), values[name].get_value())


def test_other_formats_are_refused(tiny_model_dir):
    with pytest.raises(
        ConversionError, match="base_dtype must be None or one of int8, int4, nf4, got 'int2'"
    ):
        load_pretrained(tiny_model_dir, base_dtype="int2")  # pyright: ignore[reportArgumentType]


def test_blocks_of_a_gguf_file_stay_as_they_are(smollm_path):
    """SmolLM2's matrices are stored as Q4_1, its embedding as Q8_0."""
    plain = load_pretrained(smollm_path)
    model = load_pretrained(smollm_path, base_dtype="int4")
    dense = {".".join(map(str, p)): x for p, x in nnx.to_flat_state(nnx.state(plain))}
    weights = quantized_weights(model)
    assert len(weights) == 8
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.get_value().dequantize(), dense[name].get_value())
