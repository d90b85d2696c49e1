"""A layer with a memory of evicted tokens, against formulas in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import assert_close, quick_jit, raise_shares, randomize
from tests.tptt_jax.evicted_oracle import Expected, run_layer, weights_of
from tptt_jax import LizaConfig, ModelConfig
from tptt_jax.config import AttentionConfig
from tptt_jax.layers.liza import LayerTokens, LizaAttention
from tptt_jax.layers.softmax_attention import token_context
from tptt_jax.ops.documents import count_positions

PLAIN = ModelConfig.tiny()
# Everything that happens to queries, keys and outputs on the way.
RICH = ModelConfig.tiny(
    attention=AttentionConfig(
        qk_norm="head", softcap=3.0, bias=True, out_bias=True, query_scale=0.4
    )
)
ROWS, T, WINDOW, SINKS = 2, 21, 5, 2
IDS = np.array([[3] * 5 + [1] * 14 + [0] * 2, [1] * 21])
# Configuration of the model, options of the memory, scheduled share.
CASES = {
    "default": (PLAIN, {}, None),
    "no sinks": (PLAIN, {"softmax_sinks": 0}, None),
    "window of one": (PLAIN, {"softmax_window": 1}, None),
    "more sinks than window": (PLAIN, {"softmax_window": 2, "softmax_sinks": 4}, None),
    "norms, biases, soft cap": (RICH, {}, None),
    "two steps, no deltas": (PLAIN, {"operator": "gated_delta_product", "memory_rank": 0}, None),
    "gates from keys": (PLAIN, {"beta_gate": "k", "alpha_gate": "k", "memory_rank": 0}, None),
    "nothing forgotten": (PLAIN, {"operator": "delta_rule"}, None),
    "learned share, matched size": (PLAIN, {"mag": "learned", "linear_scale": "match"}, None),
    "scheduled share, unit size": (PLAIN, {"mag": "scheduled", "linear_scale": "unit"}, 0.4),
}


def _layer(config=PLAIN, **options):
    """Random weights, and a share that is neither 0 nor 1."""
    defaults = {"softmax_window": WINDOW, "softmax_sinks": SINKS, "chunk_size": 4}
    liza = LizaConfig(**defaults | {"memory_rank": 3, "mag_init": 0.4} | options)
    layer = LizaAttention(config, liza, None, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return raise_shares(randomize(layer))


def _inputs(config=PLAIN, length=T, seed=0):
    x = np.random.default_rng(seed).standard_normal((ROWS, length, config.embed_dim))
    return jnp.asarray(x, jnp.float32)


def _run(layer, x, ids=None, share=None):
    """The layer's output and branches."""
    graphdef, state = nnx.split(layer)
    share = None if share is None else jnp.asarray(share)

    @quick_jit
    def call(state, x, ids):
        layer = nnx.merge(graphdef, state)
        positions = count_positions(x.shape[:2], ids, None)
        context = token_context(layer.config, layer.liza, "full", positions, ids, None)
        return layer(x, LayerTokens({"full": context}, ("full",), share=share))

    return jax.tree.map(np.asarray, call(state, x, None if ids is None else jnp.asarray(ids)))


def _expected(layer, x, share=None) -> Expected:
    return run_layer(
        weights_of(layer), layer.config, layer.liza, np.asarray(x, np.float64), share or 0
    )


def _compare(got, row, mask, want, what):
    assert_close(got.branches.softmax[row, mask], want.softmax, 1e-5, f"{what}: softmax")
    assert_close(got.branches.linear[row, mask], want.linear, 1e-5, f"{what}: memory")
    assert_close(got.out[row, mask], want.out, 1e-5, f"{what}: output")


@pytest.mark.parametrize(("config", "options", "share"), CASES.values(), ids=CASES)
def test_packed_documents_equal_the_formulas(config, options, share):
    layer, x = _layer(config, **options), _inputs(config)
    # Padding holds huge numbers, which would show.
    got = _run(layer, jnp.where(jnp.asarray(IDS)[..., None] != 0, x, 1e4), IDS, share)
    shares = []
    for row in range(ROWS):
        for number in set(IDS[row]) - {0}:
            mask = IDS[row] == number
            want = _expected(layer, x[row, mask], share)
            _compare(got, row, mask, want, f"document {number} of row {row}")
            shares.append(want.share)
    mixed = np.concatenate(shares)
    mixed = mixed[mixed > 0]
    # Neither branch may hide behind the other.
    assert 0.1 < mixed.mean() < 0.9
    assert len(mixed) > 40


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_rows_equal_the_formulas_whatever_the_chunk(chunk_size):
    layer, x = _layer(chunk_size=chunk_size), _inputs()
    got = _run(layer, x)
    for row in range(ROWS):
        _compare(got, row, slice(None), _expected(layer, x[row]), f"row {row}")
