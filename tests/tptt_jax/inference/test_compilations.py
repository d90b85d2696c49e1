"""Texts of any length are read, continued and scored with the same few programs."""

import numpy as np
import pytest
from flax import nnx

from tests.compilations import count_compilations
from tests.contracts import random_tokens
from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate
from tptt_jax.inference.prefill import read
from tptt_jax.inference.score import token_losses

SMALL = ModelConfig.tiny(num_layers=2, mlp_dim=16)
# The model, and how many sizes its caches have for these lengths.
MODELS = {
    "caches that double": (SMALL, None, 3),
    "window": (SMALL, LizaConfig(writes="all", softmax_window=8), 1),
}
LENGTHS = (3, 70, 600, 1030)


@pytest.fixture(params=MODELS, ids=str)
def titan(request):
    """A model, and its number of cache sizes."""
    config, liza, sizes = MODELS[request.param]
    return CausalLM(config, liza, rngs=nnx.Rngs(0)), sizes


def test_prompts_and_outputs_of_many_lengths(titan):
    model, sizes = titan
    with count_compilations() as first:
        for length in LENGTHS:
            for new in (5, 70):
                generate(model, random_tokens((1, length)), new)
    # Whole segments, and what is left of a prompt.
    assert first["_read"] <= 2 * sizes
    assert first["_decode"] <= sizes
    with count_compilations() as again:
        for length in (1, 65, 700, 1500):
            for new in (1, 9, 100):
                generate(model, random_tokens((1, length)), new)
    assert not again


def test_states_are_read_on_with_the_same_programs(titan):
    model, _ = titan
    state = read(model, random_tokens((1, 20)))
    generate(model, random_tokens((1, 7)), 4, state=state)
    with count_compilations() as again:
        for length in (1, 30, 200):
            generate(model, random_tokens((1, length)), 6, state=state)
            state = read(model, random_tokens((1, length)), state=state)
    assert not again


def test_texts_of_many_lengths_are_scored(titan):
    model, sizes = titan

    def score(lengths):
        for length in lengths:
            text = random_tokens((1, length))[0]
            losses = np.concatenate(list(token_losses(model, np.array_split(text, 3))))
            assert len(losses) == length - 1

    with count_compilations() as first:
        score(LENGTHS)
    assert first["_score_segment"] <= sizes
    with count_compilations() as again:
        score((2, 11, 64, 333, 1024, 1026, 1500))
    assert not again
