import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate
from tptt_jax.inference import generate as module
from tptt_jax.inference import prefill
from tptt_jax.inference.generate import stream
from tptt_jax.inference.sampling import (
    Sampling,
    distribution_logits,
    penalize_repetition,
    sample,
)

GEMMA_LIKE = ModelConfig.tiny(
    num_layers=4, layer_kinds=("sliding", "sliding", "full", "sliding"), sliding_window=5
)
MODELS = {
    "base": (ModelConfig.tiny(), None),
    "titan": (GEMMA_LIKE, LizaConfig(writes="all", softmax_window=7, mag_init=0.5)),
    "no softmax": (ModelConfig.tiny(num_layers=2), LizaConfig(writes="all", softmax=False)),
}
TOKENS = np.random.default_rng(0).integers(1, 97, (2, 23))


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    config, liza = MODELS[request.param]
    return CausalLM(config, liza, rngs=nnx.Rngs(0))


def greedy_by_full_forward(model, tokens, count):
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    text = np.zeros((len(tokens), tokens.shape[1] + count), np.int32)
    text[:, : tokens.shape[1]] = tokens
    for place in range(tokens.shape[1], text.shape[1]):
        text[:, place] = np.argmax(forward(state, jnp.asarray(text))[:, place - 1], axis=-1)
    return text[:, tokens.shape[1] :]


def test_greedy_equals_the_argmax_of_whole_forward_passes(model):
    want = greedy_by_full_forward(model, TOKENS, 20)
    got = generate(model, TOKENS, 20)
    assert np.array_equal(got.tokens, want)
    assert got.lengths.tolist() == [20, 20]


def test_padding_anywhere_gives_each_row_what_it_gets_alone(model):
    segments = np.ones(TOKENS.shape, np.int32)
    segments[0, :4] = 0
    segments[1, 9:12] = segments[1, -2:] = 0
    together = generate(model, TOKENS, 8, segment_ids=segments).tokens
    for row in range(2):
        alone = generate(model, TOKENS[row : row + 1, segments[row] != 0], 8).tokens
        assert np.array_equal(together[row], alone[0])


def test_prompts_longer_than_a_segment(model, monkeypatch):
    want = generate(model, TOKENS, 8).tokens
    for name, size in (("SEGMENT_TOKENS", 8), ("TAIL_TOKENS", 4), ("CALL_TOKENS", 16)):
        monkeypatch.setattr(prefill, name, size)
    assert np.array_equal(generate(model, TOKENS, 8).tokens, want)


def test_a_stop_token_ends_its_row_only(model):
    free = np.asarray(generate(model, TOKENS, 12).tokens)
    stop = next(token for token in free[0] if token not in free[1])
    end = free[0].tolist().index(stop) + 1
    got = generate(model, TOKENS, 12, stop_tokens=(int(stop),))
    assert got.lengths.tolist() == [end, 12]
    assert np.array_equal(got.tokens[0, :end], free[0, :end])
    assert set(got.tokens[0, end:].tolist()) <= {0}
    assert np.array_equal(got.tokens[1], free[1])


def test_stream_gives_the_same_in_blocks(model):
    blocks = list(stream(model, TOKENS, 20, block=8))
    assert [block.shape[1] for block in blocks] == [1, 8, 8, 3]
    assert np.array_equal(np.concatenate(blocks, axis=1), generate(model, TOKENS, 20).tokens)


def test_lengths_do_not_recompile(model):
    generate(model, TOKENS, 20)
    sizes = prefill._read._cache_size(), module._decode._cache_size()
    generate(model, TOKENS[:, :5], 3)
    generate(model, np.tile(TOKENS, (1, 15)), 31, temperature=0.7, top_k=3, top_p=0.9)
    assert (prefill._read._cache_size(), module._decode._cache_size()) == sizes


def test_sampling_is_reproducible_and_depends_on_the_key(model):
    first, again, other = (
        generate(model, TOKENS, 16, temperature=1.0, key=jax.random.key(seed)).tokens
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_memory_it_is_the_base_model():
    titan = CausalLM(ModelConfig.tiny(), LizaConfig(writes="all", mag_init=0.5), rngs=nnx.Rngs(0))
    plain = CausalLM(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    nnx.update(titan, nnx.state(plain))
    off = generate(titan, TOKENS, 12, use_memory=False).tokens
    assert np.array_equal(off, generate(plain, TOKENS, 12).tokens)
    assert not np.array_equal(off, generate(titan, TOKENS, 12).tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"temperature": float("nan")}, "temperature"),
        ({"stop_strings": ("a",)}, "need decode"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, "each of 2 rows"),
        ({"segment_ids": np.zeros((2, 23), int)}, "at least one token"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    plain = CausalLM(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        generate(plain, TOKENS, **options)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_p=0.55), {1, 3}),
        (Sampling(1.0, top_p=0.4), {3}),
        (Sampling(1.0, min_p=0.5), {1, 3}),
        (Sampling(1.0, min_p=0.25), {1, 2, 3}),
        (Sampling(1.0, top_k=2, top_p=0.6), {3}),
        (Sampling(0.0), {3}),
        (Sampling(1e-4), {3}),
    ],
    ids=[
        *("all", "top-k", "top-p", "top-p-one", "min-p", "lower min-p", "top-p of top-k"),
        *("greedy", "cold"),
    ],
)
def test_sampling_draws_from_what_it_should(sampling, allowed):
    logits = jnp.log(jnp.array([[0.05, 0.3, 0.15, 0.5]]))
    draw = jax.jit(jax.vmap(lambda key: sample(logits, sampling, key[None])[0]))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 500)))
    assert set(drawn.tolist()) == allowed
    if allowed == {0, 1, 2, 3}:
        np.testing.assert_allclose(np.bincount(drawn) / 500, [0.05, 0.3, 0.15, 0.5], atol=0.07)


WARPERS = {
    "top-k": ({"top_k": 7}, [("TopKLogitsWarper", {"top_k": 7})]),
    "top-p": ({"top_p": 0.8}, [("TopPLogitsWarper", {"top_p": 0.8})]),
    "min-p": ({"min_p": 0.1}, [("MinPLogitsWarper", {"min_p": 0.1})]),
    "all": (
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
        [
            ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.3}),
            ("TemperatureLogitsWarper", {"temperature": 0.7}),
            ("TopKLogitsWarper", {"top_k": 20}),
            ("TopPLogitsWarper", {"top_p": 0.9}),
            ("MinPLogitsWarper", {"min_p": 0.02}),
        ],
    ),
    "penalty below 1": (
        {"repetition_penalty": 0.6},
        [("RepetitionPenaltyLogitsProcessor", {"penalty": 0.6})],
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize(("options", "warpers"), WARPERS.values(), ids=WARPERS)
def test_distributions_are_those_of_transformers(options, warpers):
    import torch
    from transformers.generation import logits_process

    rng = np.random.default_rng(1)
    logits = (3 * rng.standard_normal((3, 50))).astype(np.float32)
    held = rng.integers(0, 50, (3, 9))
    scores = torch.tensor(logits)
    for name, arguments in warpers:
        scores = getattr(logits_process, name)(**arguments)(torch.tensor(held), scores)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, held, True, axis=1)
    sampling = Sampling(**{"temperature": 1.0} | options)
    penalized = penalize_repetition(jnp.asarray(logits), seen, sampling.repetition_penalty)
    got = np.asarray(distribution_logits(penalized, sampling))
    assert np.array_equal(np.isinf(got), np.isinf(scores.numpy()))
    np.testing.assert_allclose(got, scores.numpy(), rtol=1e-5)


def test_repetition_penalty_counts_prompt_and_output(model):
    free = generate(model, TOKENS, 20).tokens
    got = np.asarray(generate(model, TOKENS, 20, repetition_penalty=1e6).tokens)
    assert not np.array_equal(free, got)
    for row, prompt in zip(got, TOKENS, strict=True):
        # With so large a penalty nothing comes twice while there is something new.
        assert len({*row, *prompt}) == len(row) + len(set(prompt))


def test_a_row_draws_what_it_draws_alone(model):
    keys = jax.random.split(jax.random.key(5), 2)
    options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
    together = generate(model, TOKENS, 12, key=keys, **options).tokens
    for row in range(2):
        alone = generate(model, TOKENS[row : row + 1], 12, key=keys[row : row + 1], **options)
        assert np.array_equal(together[row], alone.tokens[0])


def test_a_stop_string_ends_its_row_only(model):
    def decode(tokens):
        return "".join(f"<{token}>" for token in tokens)

    free = np.asarray(generate(model, TOKENS, 12).tokens)
    stop = decode(free[0, 3:6])[2:-1]  # cut inside its first and last token
    want = next(n for n in range(13) if stop in decode(free[0, :n]))
    got = generate(model, TOKENS, 12, stop_strings=("never", stop), decode=decode)
    assert got.lengths[0] == want
    assert np.array_equal(got.tokens[0, :want], free[0, :want])
    assert not got.tokens[0, want:].any()
    if stop not in decode(free[1]):
        assert np.array_equal(got.tokens[1], free[1])


def test_decoding_writes_its_state_in_place(model):
    blocks = stream(model, TOKENS, 20, block=8)
    before = blocks.state
    next(blocks)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.stacks))


def test_the_prompt_s_state_is_not_used_up(model):
    state = prefill.read(model, TOKENS)
    first, again = (generate(model, TOKENS[:, :0], 8, state=state).tokens for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, generate(model, TOKENS, 8).tokens)
