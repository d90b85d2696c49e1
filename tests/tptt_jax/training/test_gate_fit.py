"""The start of a fit in closed form."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import quick_jit, random_tokens, randomize
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.training.fit import gap_gradients
from tptt_jax.training.gate_fit import fit_gates
from tptt_jax.training.partition import load_trainable, split_trainable

WINDOW, SINKS = 6, 2


@pytest.fixture(scope="module")
def fitted():
    """(model before, model after, what was fitted), on rows of 24 and 40 tokens."""
    config = ModelConfig.tiny(num_layers=2, mlp_dim=16)
    liza = LizaConfig(softmax_window=WINDOW, softmax_sinks=SINKS, chunk_size=8, memory_rank=4)
    before, after = (randomize(CausalLM(config, liza, rngs=nnx.Rngs(0))) for _ in range(2))
    partition, trainable, _ = split_trainable(after, "memory")
    rows = [(jnp.asarray(random_tokens((2, n), seed=n)), None) for n in (24, 40)]
    solved = fit_gates(partition, trainable, partition.frozen, rows)
    load_trainable(after, solved, None)
    return before, after, {k: v for k, v in solved.items() if v is not trainable[k]}


@functools.partial(quick_jit, static_argnums=0)
def gaps_of(graphdef, state, tokens):
    return gap_gradients(nnx.merge(graphdef, state), tokens)[0]


def gaps(model, tokens):
    return np.asarray(gaps_of(*nnx.split(model), tokens))


def test_gates_and_sizes_alone_are_solved_for(fitted):
    names = {"mag.weight", "mag.slope", "mag.bias", "mag.limit", "memory.scale.bias"}
    assert {path.removeprefix("stacks.0.self_attn.") for path in fitted[2]} == names


def test_the_limit_is_what_the_memory_has_held(fitted):
    limit = fitted[1].stacks[0].self_attn.mag.limit[...]
    np.testing.assert_allclose(np.exp(limit), 40 - WINDOW - SINKS, rtol=1e-5)


def test_it_is_a_better_start(fitted):
    before, after, _ = fitted
    tokens = jnp.asarray(random_tokens((4, 40), seed=7))
    # Not in every layer: a read-out of noise is worse than none where shares are large.
    assert gaps(after, tokens).mean() < gaps(before, tokens).mean() - 0.1


def test_rows_that_lose_nothing_are_refused(fitted):
    partition, trainable, _ = split_trainable(fitted[0], "memory")
    rows = [(jnp.asarray(random_tokens((1, WINDOW + SINKS))), None)]
    with pytest.raises(ValueError, match="no token leaves the window"):
        fit_gates(partition, trainable, partition.frozen, rows)
