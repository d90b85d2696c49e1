"""Arguments of wrong kinds are refused in our own words."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate, ops
from tptt_jax.ops.delta_product.triangular import invert_unit_lower

Q, K, BETA = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8, 1, 2, 4)), jnp.ones((1, 8, 1, 2))
STATE = jnp.zeros((1, 2, 4, 4))

CALLS = {
    "chunk": lambda x: ops.chunk_delta_product(x, K, K, BETA),
    "chunk, keys": lambda x: ops.chunk_delta_product(Q, x, K, BETA),
    "naive": lambda x: ops.naive_delta_product(x, K, K, BETA),
    "step": lambda x: ops.step_delta_product(x, K[:, 0], K[:, 0], BETA[:, 0], STATE),
    "step, keys": lambda x: ops.step_delta_product(Q[:, 0], x, K[:, 0], BETA[:, 0], STATE),
    "mean": ops.causal_mean,
    "gate": lambda x: ops.compute_gate("k", x, Q),
    "virtual tokens": lambda x: ops.expand_virtual_tokens(x, 2, "derivative"),
    "shift": lambda x: ops.shift_tokens(x, 1),
    "documents": ops.document_ordinals,
    "inverse": invert_unit_lower.__wrapped__,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("given", [[[1.0, 2.0]], "text"], ids=["list", "text"])
def test_operators_take_arrays(call, given):
    kind = type(given).__name__
    with pytest.raises(TypeError, match=f"must be an array, got {kind}: convert it with"):
        call(given)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operators_name_the_axes(call):
    with pytest.raises(ValueError, match=r"must .*\[.*\].*, got \(?shape|must have shape"):
        call(jnp.ones(3))


@pytest.fixture(scope="module")
def model():
    return CausalLM(ModelConfig.tiny(), LizaConfig(softmax_window=4), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2]], TypeError, "tokens must be an array, got list"),
        ("text", TypeError, "tokens must be an array, got str"),
        (None, TypeError, "tokens must be an array, got None"),
        (jnp.arange(3), ValueError, r"tokens must have 2 axes \(\[B, T\]\), got shape \(3,\)"),
        (jnp.ones((1, 3)), ValueError, r"tokens must be integers \(\[B, T\]\), got float32"),
        (jnp.full((1, 3), 97), ValueError, "token ids 0 to 96, got 97"),
        (jnp.full((1, 3), -1), ValueError, "token ids 0 to 96, got -1"),
    ],
)
def test_a_model_takes_rows_of_its_own_token_ids(model, tokens, error, message):
    with pytest.raises(error, match=message):
        model(tokens)


def test_ids_at_padding_do_not_matter_and_traced_ones_are_not_read(model):
    tokens, ids = jnp.asarray([[5, 6, 99]]), jnp.asarray([[1, 1, 0]])
    outside = jax.eval_shape(model, tokens, ids).logits
    assert model(tokens, ids).logits.shape == outside.shape == (1, 3, 97)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("text", "tokens must be integers .* got str .* encode text with the model's tokenizer"),
        ([["a", "b"]], "tokens must be integers"),
        ([[1.5, 2.0]], "tokens must be integers"),
        ([[1, 2], [3]], "rows of tokens must be equally long .* pad the shorter ones"),
        ([1, 2], r"tokens must have shape \[B, T\], got \(2,\)"),
    ],
)
def test_generate_takes_rows_of_integers(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, 2)
