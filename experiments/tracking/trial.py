"""One trial: a model is trained on short words and tested on long ones."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.tracking.groups import (
    GroupName,
    Words,
    draw_words,
    multiplication_table,
    word_elements,
)
from experiments.tracking.model import Tracker, Variant
from tptt_jax.array_typing import Array, Float

Step = Callable[[Any, Any, Words], tuple[Any, Any]]

# Seed of the test words, the same for all trials.
_TEST_SEED = 1 << 30
_TEST_BATCH = 32
_SIZES = ("batch_size", "length")


@dataclass(frozen=True)
class Trial:
    """One training run: group, update rule and seed."""

    group: GroupName
    variant: Variant
    seed: int
    """Seed of the initial values and of the words."""

    @property
    def label(self) -> str:
        """The name in reports."""
        return f"{self.group}, {self.variant.label}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of all trials."""

    length: int
    """Elements of a word in training."""
    short_length: int
    """The same in the first half of the steps, in which the group is learned."""
    test_length: int
    test_words: int
    steps: int
    batch_size: int
    learning_rate: float
    """Peak learning rate of Adam."""
    dim: int
    heads: int


def run_trial(trial: Trial, training: Training) -> Float[np.ndarray, " T"]:
    """Trains a model and returns its accuracy at each position of test words, 0 to 1."""
    table = jnp.asarray(multiplication_table(trial.group))
    used = jnp.asarray(word_elements(trial.group))
    rngs = nnx.Rngs(trial.seed)
    model = Tracker(trial.variant, len(table), dim=training.dim, heads=training.heads, rngs=rngs)
    graph, parameters = nnx.split(model)
    logits = functools.partial(_logits, graph)
    optimizer = _optimizer(training)
    step, draw = _make_step(logits, optimizer), jax.jit(draw_words, static_argnames=_SIZES)
    state, key = optimizer.init(parameters), jax.random.key(trial.seed)
    for number in range(training.steps):
        is_short = number < training.steps // 2
        length = training.short_length if is_short else training.length
        sizes = {"batch_size": training.batch_size, "length": length}
        words = draw(jax.random.fold_in(key, number), table, used, **sizes)
        parameters, state = step(parameters, state, words)
    words = draw_words(
        jax.random.key(_TEST_SEED),
        table,
        used,
        batch_size=training.test_words,
        length=training.test_length,
    )
    return _accuracy(jax.jit(logits), parameters, words)


def _logits(graph: Any, parameters: Any, elements: Array) -> Array:
    return nnx.merge(graph, parameters)(elements)


def _optimizer(training: Training) -> optax.GradientTransformation:
    rate, steps = training.learning_rate, training.steps
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 20), steps, rate / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def _make_step(logits: Any, optimizer: optax.GradientTransformation) -> Step:
    def loss(parameters: Any, words: Words) -> Array:
        scores = logits(parameters, words.elements)
        return optax.softmax_cross_entropy_with_integer_labels(scores, words.products).mean()

    @jax.jit
    def step(parameters: Any, state: Any, words: Words) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(parameters, words)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return step


def _accuracy(logits: Any, parameters: Any, words: Words) -> Float[np.ndarray, " T"]:
    is_right = [
        np.asarray(logits(parameters, words.elements[i : i + _TEST_BATCH]).argmax(-1))
        == np.asarray(words.products[i : i + _TEST_BATCH])
        for i in range(0, len(words.elements), _TEST_BATCH)
    ]
    return np.concatenate(is_right).mean(axis=0)
