"""A step in several parts is the step of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

LIZA = LizaConfig(softmax_window=6, softmax_sinks=1, memory_rank=2)
RNG = np.random.default_rng(0)
# Rows with few and with many targets, among them one without any.
SHARES = np.array([0.1, 0.9, 0.0, 0.5, 1.0, 0.3])[:, None]
BATCH = Batch(
    jnp.asarray(RNG.integers(0, 97, (6, 21))),
    jnp.asarray(np.repeat([[1], [1], [1], [1], [1], [1]], 21, axis=1) + (np.arange(21) > 12)),
    jnp.asarray(RNG.random((6, 21)) < SHARES),
)


def step_of(accumulate: int, batch: Batch = BATCH, **options):
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(dropout=0.0), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10, partition)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    step = make_train_step(partition, optimizer, accumulate=accumulate, **options)
    return step(state, partition.frozen, batch)


def test_parts_add_up_to_the_whole_batch():
    """With both losses: distillation has a second forward pass in each part."""
    whole, expected = step_of(1, distill=0.5)
    state, metrics = step_of(3, distill=0.5)
    assert metrics.is_finite
    assert float(metrics.tokens) == float(expected.tokens)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-5)
    # AdamW's first moment is a tenth of the gradient; updates alone would only show signs.
    for right, got in zip(
        jax.tree.leaves(whole.opt_state), jax.tree.leaves(state.opt_state), strict=True
    ):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-6)


def test_dropout_differs_from_part_to_part():
    """Two equal rows in two parts: with one mask for both the loss would be that of one row."""
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(dropout=0.5), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    trainable = {
        name: jnp.ones_like(x) if name.endswith("lora.b") else x for name, x in trainable.items()
    }
    optimizer = make_optimizer(OptimizerConfig(), 10, partition)
    one = Batch(*(x[4:5] for x in BATCH))
    losses = []
    for batch, parts in ((one, 1), (Batch(*(jnp.repeat(x, 2, axis=0) for x in one)), 2)):
        state = init_train_state(trainable, share, optimizer, jax.random.key(0))
        step = make_train_step(partition, optimizer, accumulate=parts)
        losses.append(float(step(state, partition.frozen, batch)[1].loss))
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 rows cannot be worked through in 4 equal parts"):
        step_of(4)


def rows_of(rows: slice, length: int = 21) -> Batch:
    return Batch(*(x[rows, :length] for x in BATCH))


@functools.cache
def descent(asked_parts: int):
    """A step of plain gradient descent, and the parts of the model that it takes."""
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(dropout=0.0), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    step = make_train_step(partition, optax.sgd(1.0), asked_parts=asked_parts)
    return step, partition, trainable, share


def summed_gradient(batch: Batch, asked: Batch | None = None, asked_parts: int = 0):
    """The gradient of the summed loss, and its metrics."""
    step, partition, trainable, share = descent(asked_parts)
    trainable = {  # adapters of rank 8 whose b is zero have no gradient at a
        name: x + 0.01 if name.endswith("lora.b") else x for name, x in trainable.items()
    }
    state = init_train_state(trainable, share, optax.sgd(1.0), jax.random.key(0))
    state, metrics = step(state, partition.frozen, batch, None, asked)
    tokens = float(metrics.tokens)
    found = {name: (x - state.trainable[name]) * tokens for name, x in trainable.items()}
    return found, metrics


@pytest.mark.parametrize("length", [21, 15])
def test_rows_for_the_memory_alone_do_not_reach_other_parameters(length):
    """They may be shorter or longer than rows of text."""
    text, of_text = summed_gradient(rows_of(slice(0, 2)))
    other, of_other = summed_gradient(rows_of(slice(2, 6), length))
    whole = {name: gradient + other[name] for name, gradient in text.items()}
    asked = rows_of(slice(2, 6), length)
    found, metrics = summed_gradient(rows_of(slice(0, 2)), asked, asked_parts=2)
    losses = [float(m.loss * m.tokens) for m in (metrics, of_text, of_other)]
    np.testing.assert_allclose(losses[0], losses[1] + losses[2], rtol=1e-6)
    assert float(metrics.tokens) == float(of_text.tokens + of_other.tokens)
    memory = [name for name in found if ".memory." in name or ".mag." in name]
    assert 0 < len(memory) < len(found)
    for name, gradient in found.items():
        right = (whole if name in memory else text)[name]
        np.testing.assert_allclose(gradient, right, rtol=1e-3, atol=1e-4, err_msg=name)
    others = [name for name in found if name not in memory]
    # Both comparisons could fail: the rows for the memory have a gradient in either part.
    for names in (memory, others):
        assert max(np.abs(whole[name] - text[name]).max() for name in names) > 1e-2


def test_rows_for_the_memory_alone_need_a_memory():
    model = CausalLM(ModelConfig.tiny(), None, LoraConfig(), rngs=nnx.Rngs(0))
    partition, *_ = split_trainable(model, "lora")
    with pytest.raises(ValueError, match="need a memory that is trained, and this model has none"):
        make_train_step(partition, optax.sgd(1.0), asked_parts=1)
    with pytest.raises(ValueError, match="if, and only if, it has parts"):
        summed_gradient(rows_of(slice(0, 2)), rows_of(slice(2, 4)))
