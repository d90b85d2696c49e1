"""Models with a memory of evicted tokens: streaming, traced windows, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import shapes
from tests.contracts import (
    assert_close,
    assert_trees_close,
    jitted,
    logits_of,
    quick_jit,
    raise_shares,
    random_tokens,
    randomize,
    relative_error,
    remove_shares,
    verify_streaming_contract,
)
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import AttentionConfig, RopeConfig
from tptt_jax.decoder import memory_location
from tptt_jax.layers.memory import DeltaMemory, MemoryTokens
from tptt_jax.model import base_model, init_cache, replace_memory

LLAMA = ModelConfig.tiny(num_layers=2, mlp_dim=16)
# Two full layers among sliding ones, all in one stack.
GEMMA = dataclasses.replace(
    shapes.GEMMA,
    attention=dataclasses.replace(shapes.GEMMA.attention, softcap=3.0),
    layer_kinds=("sliding", "full", "sliding", "full", "sliding"),
)
LEARNED_POSITIONS = dataclasses.replace(
    LLAMA, position_embedding="learned", attention=AttentionConfig(bias=True)
)
# What leaves the ring is rotated back, and the factor 1.7 on its keys taken out.
YARN = dataclasses.replace(
    LLAMA,
    rope=RopeConfig(
        **{"theta": 50.0, "scaling": "yarn", "factor": 4.0, "original_max_positions": 8},
        **{"beta_fast": 2.0, "beta_slow": 0.1, "attention_factor": 1.7},
    ),
)
CLIPPED = dataclasses.replace(LLAMA, attention=AttentionConfig(qk_norm="full", clip_qkv=2.0))
KEPT = ModelConfig.tiny(mlp_dim=16, layer_kinds=("sliding", "full", "full"), sliding_window=5)
SLIDING = dataclasses.replace(LLAMA, layer_kinds=("sliding",) * 2, sliding_window=5)
# Calls of five tokens are longer than some of these windows and shorter than others.
STREAMS = {
    "default": (LLAMA, {"softmax_window": 4}),
    "no sinks, scheduled share, unit size": (
        LLAMA,
        {"softmax_sinks": 0, "mag": "scheduled", "linear_scale": "unit"},
    ),
    "rotated with an attention factor": (YARN, {"softmax_window": 4, "softmax_sinks": 2}),
    "two steps, clipped": (CLIPPED, {"operator": "delta_product"}),
    "three steps, combined, window of two": (
        LLAMA,
        {
            **{"operator": "delta_product_c", "num_householder": 3, "alpha_gate": "projected"},
            **{"softmax_window": 2, "softmax_sinks": 3},
        },
    ),
    "gates from keys, a horizon": (
        LLAMA,
        {"operator": "gated_delta_product", "beta_gate": "k", "alpha_gate": "k", "horizon": 3},
    ),
    "vector gates from both, a horizon alone": (
        LLAMA,
        {
            **{"operator": "delta_rule", "beta_gate": "kv", "vector_beta": True, "horizon": 4},
            "softmax_window": 4,
        },
    ),
    "gelu": (LLAMA, {"operator": "delta_rule_gelu", "chunk_size": 4}),
    "learned share and positions": (
        LEARNED_POSITIONS,
        {"mag": "learned", "linear_scale": "match", "softmax_window": 4},
    ),
    "sliding and full layers": (GEMMA, {}),
    "layers of different sizes": (shapes.UNEVEN, {"softmax_window": 4}),
    "kept, full and sliding layers": (KEPT, {"full_layers": (2,)}),
    "every token, projected gates": (
        LLAMA,
        {"writes": "all", "beta_gate": "projected", "alpha_gate": "projected"},
    ),
}


def _titan(config=LLAMA, *, dtype=jnp.float32, lora=None, **options):
    defaults = {"softmax_window": 6, "softmax_sinks": 2, "chunk_size": 8, "mag_init": 0.4}
    liza = LizaConfig(**defaults | {"memory_rank": 2} | options)
    return raise_shares(randomize(CausalLM(config, liza, lora, dtype=dtype, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(("config", "options"), STREAMS.values(), ids=STREAMS)
def test_splits_padding_and_packing_change_nothing(config, options):
    model, tokens = _titan(config, **options), random_tokens((2, 18))
    whole = verify_streaming_contract(model, tokens)
    # A memory that changes nothing would hide its errors.
    assert relative_error(logits_of(remove_shares(model), tokens), whole) > 0.1


def test_beyond_its_horizon_a_memory_forgets_faster():
    """After 5 evicted tokens no half-life is above 2.5; up to there nothing differs."""
    plain, tokens = _titan(), random_tokens((1, 24))
    model = replace_memory(plain, dataclasses.replace(plain.liza, horizon=5))
    found, expected = jitted(model)(tokens).logits, jitted(plain)(tokens).logits
    # Token 6 + 2 + i evicts the one that makes i + 1.
    assert_close(found[:, :13], expected[:, :13], 1e-6, "within the horizon")
    assert relative_error(found[:, 13:], expected[:, 13:]) > 1e-3

    written = DeltaMemory(12, 2, 1, 6, model.liza, rngs=nnx.Rngs(0)).written(
        jnp.ones((1, 7, 12)),
        MemoryTokens(*(jnp.ones((1, 7, 1, 6)) for _ in "kv"), held=jnp.arange(1, 8)[None]),
    )
    half_lives = np.log(0.5) / np.asarray(written.log_decay)[0, :, 0]
    assert (half_lives[:5] > 50).all()
    np.testing.assert_allclose(half_lives[5:], 2.5, rtol=1e-5)


def test_a_model_of_sliding_layers_streams_without_a_memory():
    model, tokens = _titan(SLIDING), random_tokens((2, 18))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert not any("memory" in name or "mag" in name for name in names)
    assert init_cache(model, 2, 18).stacks[0].memory is None
    whole = verify_streaming_contract(model, tokens)
    assert_close(jitted(model, use_memory=False)(tokens).logits, whole, 1e-6, "memory off")


def test_an_id_that_comes_back_is_another_document():
    """Also if the document between fits the window, and nothing of it ever leaves."""
    model, tokens = _titan(softmax_window=4), random_tokens((1, 12))
    run = jitted(model)
    want = run(tokens).logits
    packed = np.concatenate([tokens, random_tokens((1, 3), 5), tokens], axis=1)
    for ids in ([1] * 12 + [2] * 3 + [3] * 12, [1] * 12 + [2] * 3 + [1] * 12):
        got = run(packed, np.array([ids])).logits
        assert_close(got[:, :12], want, 1e-5, "first document")
        assert_close(got[:, 15:], want, 1e-5, f"last document, id {ids[-1]}")


def test_kept_layers_hold_every_token_and_have_no_memory():
    model = _titan(KEPT, full_layers=(2,))
    for path, variable in nnx.to_flat_state(nnx.state(model.stacks[0])):
        is_memory = "memory" in path or "mag" in path
        assert variable.get_value().shape[0] == (1 if is_memory else 3), path
    assert [memory_location(KEPT, model.liza, layer) for layer in range(3)] == [None, (0, 0), None]
    stack = init_cache(model, 2, 40).stacks[0]
    assert {kind: cache.keys.shape[:3] for kind, cache in stack.softmax.items()} == {
        "sliding": (1, 2, 5),
        "full": (1, 2, 6),
        "kept": (1, 2, 40),
    }
    assert stack.softmax["kept"].sink_keys.size == 0
    assert stack.memory.state.shape[0] == 1


@pytest.mark.parametrize("writes", ["evicted", "all", "none"])
def test_kept_layers_compute_what_the_base_model_does(writes):
    """The first two layers are kept, so the third one sees what it would in the base model."""
    config, tokens = ModelConfig.tiny(mlp_dim=16), random_tokens((2, 18))
    model = _titan(config, writes=writes, full_layers=(0, 1))
    got, base = (jitted(m, return_branches=True)(tokens) for m in (model, base_model(model)))
    assert_close(got.branches[0].softmax[:2], base.branches[0].softmax[:2], 1e-6, "kept layers")
    assert relative_error(got.branches[0].softmax[2], base.branches[0].softmax[2]) > 1e-2
    if writes != "none":
        linear = np.asarray(got.branches[0].linear)
        assert [bool(layer.any()) for layer in linear] == [False, False, True]
    run, cache = jitted(model), init_cache(model, 2, 18)
    for t in range(18):
        output = run(tokens[:, t : t + 1], cache=cache)
        cache = output.cache
    assert_close(output.logits[:, 0], got.logits[:, -1], 1e-5, "token by token")


def test_only_full_layers_have_parameters_and_states():
    model = _titan(GEMMA)
    stack = nnx.state(model.stacks[0])
    for path, variable in nnx.to_flat_state(stack):
        is_memory = "memory" in path or "mag" in path
        assert variable.get_value().shape[0] == (2 if is_memory else 5), path
    places = [memory_location(GEMMA, model.liza, layer) for layer in range(5)]
    assert places == [None, (0, 0), None, (0, 1), None]
    memory = init_cache(model, 3, 1_000_000).stacks[0].memory
    assert memory.state.shape == (2, 3, 1, GEMMA.head_dim, GEMMA.head_dim)
    # Projected gates and one step per token look at nothing but the token.
    assert memory.history.keys.shape == (2, 3, 0, 1, GEMMA.head_dim)
    assert memory_location(shapes.UNEVEN, LizaConfig(softmax_window=4), 1) == (1, 0)


def test_sliding_layers_do_not_feel_the_memory():
    """Only the two full layers have a linear branch; nothing is added to the others."""
    model, tokens = _titan(GEMMA), random_tokens((2, 18))
    branches = jitted(model, return_branches=True)(tokens).branches[0]
    assert branches.linear.shape == branches.softmax.shape == (5, 2, 18, 4, 16)
    used = [bool(np.asarray(layer).any()) for layer in branches.linear]
    assert used == [kind == "full" for kind in GEMMA.layer_kinds]


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_bfloat16_decodes_what_it_reads(config):
    """Keys come back from the ring rounded and rotated twice."""
    model, tokens = _titan(config, dtype=jnp.bfloat16), random_tokens((2, 18))
    whole = np.asarray(jitted(model)(tokens).logits, np.float32)
    run, cache, logits = jitted(model), init_cache(model, 2, 18), []
    for t in range(18):
        output = run(tokens[:, t : t + 1], cache=cache)
        cache = output.cache
        logits.append(np.asarray(output.logits, np.float32))
    memory = cache.stacks[0].memory
    assert memory.state.dtype == jnp.float32
    assert memory.history.keys.dtype == jnp.bfloat16
    got = np.concatenate(logits, 1)
    assert np.sqrt(np.mean((got - whole) ** 2) / np.mean(whole**2)) < 5e-2
    assert relative_error(got, whole) < 5e-2
    off = logits_of(remove_shares(model), tokens).astype(np.float32)
    assert relative_error(off, whole) > 0.1


def _loss(model, tokens, ids, **options):
    """Mean log-likelihood of the tokens themselves: every position counts."""
    logits = model(tokens, ids, **options).logits
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(ids != 0, chosen, 0)), logits


def _gradients(model, **options):
    """A compiled function of tokens, ids and a traced window, and what counts its programs."""
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters, tokens, ids, window=None):
        model = nnx.merge(graphdef, parameters, rest)
        return _loss(model, tokens, ids, window=window, **options)

    run = quick_jit(jax.value_and_grad(loss, has_aux=True))
    return functools.partial(run, parameters), run


@pytest.mark.parametrize(
    ("config", "windows"), [(LLAMA, (4, 9)), (GEMMA, (4,))], ids=["llama", "gemma"]
)
def test_a_traced_window_equals_a_static_one_and_compiles_once(config, windows):
    tokens = random_tokens((2, 20))
    ids = np.array([[1] * 7 + [2] * 13, [5] * 18 + [0] * 2])
    traced, compiled = _gradients(_titan(config, softmax_window=9))
    for window in windows:
        (loss, logits), gradient = traced(tokens, ids, jnp.asarray(window))
        static, _ = _gradients(_titan(config, softmax_window=window))
        (want_loss, want_logits), want_gradient = static(tokens, ids)
        assert_close(loss, want_loss, 1e-6, f"loss, window {window}")
        assert_close(logits[ids != 0], want_logits[ids != 0], 1e-5, f"logits, window {window}")
        assert_trees_close(gradient, want_gradient, 1e-4, f"window {window}: gradient of ")
    narrow = traced(tokens, ids, jnp.asarray(2))[0][1]
    assert relative_error(narrow[ids != 0], logits[ids != 0]) > 1e-2
    assert compiled._cache_size() == 1


def test_a_cache_keeps_the_model_s_own_window():
    model = _titan()
    with pytest.raises(ValueError, match="leave window None"):
        model(random_tokens((1, 3)), cache=init_cache(model, 1, 8), window=jnp.asarray(4))


def test_gradients_do_not_depend_on_packing_or_on_what_is_computed_again():
    model, tokens = _titan(lora=LoraConfig(rank=2), softmax_window=4), random_tokens((2, 12))
    packed = np.zeros((2, 24), np.int32)
    ids = np.zeros_like(packed)
    lengths = (12, 9)
    # Both documents in the first row, with padding around; nothing in the second.
    for number, (start, length) in enumerate(zip((1, 15), lengths, strict=True)):
        packed[0, start : start + length] = tokens[number, :length]
        ids[0, start : start + length] = number + 1
    separate = (np.arange(12) < np.array(lengths)[:, None]).astype(np.int32)
    (loss, _), want = _gradients(model)[0](tokens, separate)
    for path, leaf in jax.tree.leaves_with_path(want):
        name = jax.tree_util.keystr(path)
        # What a mass gate has seen is not trained.
        assert bool(np.abs(leaf).max() > 0) is ("limit" not in name), name
    for remat in ("dots", "full"):
        (packed_loss, _), got = _gradients(model, remat=remat)[0](packed, ids)
        assert_close(packed_loss, loss, 1e-6, f"{remat}: loss")
        assert_trees_close(got, want, 1e-4, f"{remat}: gradient of ")
