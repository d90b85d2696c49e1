"""The memory as a separate layer, against numpy and in another NNX model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import assert_close, quick_jit, randomize
from tptt_jax import LinearAttention, LizaConfig

EMBED, HEADS, KV_HEADS, DIM = 24, 4, 2, 8
IDS = np.array([[0, 0, 4, 4, 4, 0, 4, 4, 9, 9, 9, 9, 0], [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]])
CONFIGS = {
    "delta_product": LizaConfig(writes="all", chunk_size=4),
    "gated, vector gates, own deltas": LizaConfig(
        writes="all",
        operator="gated_delta_product", chunk_size=4, vector_beta=True, memory_rank=2
    ),
    "gelu": LizaConfig(writes="all", operator="delta_rule_gelu", chunk_size=4),
    "three steps, expanded gates": LizaConfig(
        writes="all",
        operator="delta_product_c", num_householder=3, chunk_size=4, beta_gate="v",
        expand_gates=True,
    ),
}  # fmt: skip


def _layer(config=None, **options):
    layer = LinearAttention(
        EMBED, HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, config=config,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip
    return randomize(layer)


def _jitted(layer, method=None):
    graphdef, state = nnx.split(layer)

    def call(state, *args):
        module = nnx.merge(graphdef, state)
        return (module if method is None else getattr(module, method))(*args)

    run = quick_jit(call)
    return lambda *args: run(state, *args)


def _inputs(length=13, dtype=jnp.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal((2, length, EMBED))
    return jnp.asarray(x, dtype)


def _by_hand(layer, x, *, gated):
    """Two Householder steps of one row of one document, in float64 (TPTT section 3.2)."""
    x = np.asarray(x, np.float64)
    q, k, v = (
        (x @ np.asarray(p.kernel[...], np.float64)).reshape(len(x), -1, DIM)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )

    def activate(y):
        y = y / (1 + np.exp(-y))
        return y / np.linalg.norm(y, axis=-1, keepdims=True)

    padded = np.concatenate([k[:1], k[:1], k])
    means = (padded[2:] + padded[1:-1] + padded[:-2]) / 3
    gate = (1 / (1 + np.exp(-means))).mean(-1)
    q, keys, values = activate(q), activate(k), v / DIM**0.5
    out, state = np.zeros(q.shape), np.zeros((KV_HEADS, DIM, DIM))
    for t in range(len(x)):
        for head in range(KV_HEADS):
            if gated:
                state[head] *= gate[t, head]
            for step in range(2):
                key, value = keys[t, head], values[t, head]
                if step:
                    before = (keys[t - 1, head], values[t - 1, head]) if t else (0, 0)
                    key, value = (key - before[0]) / 2, (value - before[1]) / 2
                beta = gate[t, head]
                state[head] += np.outer(key, beta * value - beta * (state[head].T @ key))
        for head in range(HEADS):
            out[t, head] = state[head // (HEADS // KV_HEADS)].T @ q[t, head]
    out = out.reshape(len(x), -1)
    out /= np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6)
    return out @ np.asarray(layer.o_proj.kernel[...], np.float64)


def test_precision_reaches_the_products_and_leaves_the_solve_exact():
    x, ways = _inputs(), {}
    for precision in ("auto", "highest", "high", "default"):
        layer = _layer(LizaConfig(writes="all", chunk_size=4, precision=precision))
        args = (x, layer.init_state(2), jnp.zeros(2, jnp.int32))
        ways[precision] = [
            sorted(re.findall(r"precision=\(Precision\.(\w+),", str(jax.make_jaxpr(call)(*inputs))))
            for call, inputs in ((layer, args[:1]), (layer.extend, args))
        ]
    assert ways.pop("auto") == ways["highest"]
    for exact, high, default in zip(*ways.values(), strict=True):
        assert set(exact) == {"HIGHEST"}
        assert set(high) == {"HIGHEST", "HIGH"}
        assert set(default) == {"HIGHEST", "DEFAULT"}
        assert high.count("HIGH") == default.count("DEFAULT")
        assert len(exact) == len(high) == len(default)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_default_precision_stays_close(dtype):
    """Only an accelerator rounds here; then this is its bound."""
    exact, fast = (
        _layer(LizaConfig(writes="all", chunk_size=4, precision=precision))(_inputs(dtype=dtype))
        for precision in ("highest", "default")
    )
    assert fast.dtype == dtype
    assert_close(fast, exact, 1e-2, "output")


@pytest.mark.parametrize("operator", ["delta_product", "gated_delta_product"])
def test_equals_the_formulas_of_the_paper(operator):
    layer, x = _layer(LizaConfig(writes="all", operator=operator, chunk_size=4)), _inputs()
    got = _jitted(layer)(x)
    want = np.stack([_by_hand(layer, row, gated="gated" in operator) for row in x])
    assert_close(got, want, 1e-5, operator)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_extending_equals_the_whole_sequence(config):
    layer, x = _layer(config), _inputs()
    whole, extend = _jitted(layer)(x), _jitted(layer, "extend")
    # Pieces of different lengths in each row; the padding between holds noise.
    counts = [(3, 0), (4, 4), (1, 4), (0, 4), (4, 1), (1, 0)]
    state, done = layer.init_state(2), np.zeros(2, int)
    got = [[], []]
    for number, count in enumerate(counts):
        piece, valid = np.array(_inputs(4, seed=number + 5)), np.zeros((2, 4), bool)
        for row, size in enumerate(count):
            places = np.sort(np.random.default_rng(number).permutation(4)[:size])
            piece[row, places] = x[row, done[row] : done[row] + size]
            valid[row, places] = True
        out, state = extend(piece, state, jnp.asarray(done), valid)
        for row in range(2):
            got[row].append(np.asarray(out)[row, valid[row]])
        done += count
    assert (done == x.shape[1]).all()
    assert_close([np.concatenate(rows) for rows in got], whole, 1e-5, "pieces")

    single, one_by_one = layer.init_state(2), []
    for t in range(x.shape[1]):
        out, single = extend(x[:, t : t + 1], single, jnp.full(2, t), None)
        one_by_one.append(out)
    assert_close(jnp.concatenate(one_by_one, 1), whole, 1e-5, "token by token")
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(state), strict=True):
        assert_close(a, b, 1e-5, "state")


PACKED = {name: (config, False) for name, config in CONFIGS.items()} | {
    "bidirectional": (CONFIGS["three steps, expanded gates"], True),
    "bidirectional gelu": (CONFIGS["gelu"], True),
}


@pytest.mark.parametrize(("config", "bidirectional"), PACKED.values(), ids=PACKED)
def test_packed_documents_and_padding_equal_separate_runs(config, bidirectional):
    layer = _layer(config, bidirectional=bidirectional)
    # Padding is replaced by huge numbers, which would show.
    x = jnp.where(jnp.asarray(IDS)[..., None] != 0, _inputs(), 1e4)
    got = np.asarray(_jitted(layer)(x, jnp.asarray(IDS)))
    assert np.isfinite(got).all()
    assert not got[IDS == 0].any()
    places = [(row, IDS[row] == i) for row in range(2) for i in np.unique(IDS[row]) if i]
    lengths = {mask.sum() for _, mask in places}
    alone = np.zeros((len(places), max(lengths), EMBED), np.float32)
    ids = np.zeros(alone.shape[:2], int)
    for number, (row, mask) in enumerate(places):
        alone[number, : mask.sum()] = x[row, mask]
        ids[number, : mask.sum()] = 1
    want = np.asarray(_jitted(layer)(alone, jnp.asarray(ids)))
    for number, (row, mask) in enumerate(places):
        assert_close(got[row, mask], want[number, : mask.sum()], 1e-5, f"document {number}")


def test_ids_of_one_document_are_the_same_as_none():
    layer, x = _layer(), _inputs()
    run = _jitted(layer)
    assert_close(run(x, jnp.full((2, 13), 7)), run(x), 1e-6, "one document")


def test_reversing_the_input_reverses_a_bidirectional_output():
    layer, x = _layer(CONFIGS["delta_product"], bidirectional=True), _inputs()
    run = _jitted(layer)
    assert_close(run(x[:, ::-1]), run(x)[:, ::-1], 1e-5, "reversed")
    causal = _jitted(_layer(CONFIGS["delta_product"]))
    assert_close(run(x), (causal(x) + causal(x[:, ::-1])[:, ::-1]) / 2, 1e-5, "mean of both")
    late = x.at[:, -1].add(1.0)
    assert bool(jnp.all(causal(late)[:, :-1] == causal(x)[:, :-1]))
    assert bool(jnp.all(jnp.any(run(late)[:, :-1] != run(x)[:, :-1], axis=-1)))


def test_a_bidirectional_layer_cannot_be_extended():
    layer = _layer(bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional layer cannot be extended"):
        layer.extend(_inputs(), layer.init_state(2), jnp.zeros(2, int))


def test_low_precision_inputs_keep_a_float32_state():
    # The same weights in both, which bfloat16 can hold.
    low, x = _layer(dtype=jnp.bfloat16), _inputs(dtype=jnp.bfloat16)
    exact = _layer()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kernel = getattr(low, name).kernel[...]
        getattr(exact, name).kernel[...] = kernel.astype(jnp.float32)
    state = low.init_state(2, jnp.bfloat16)
    out, state = _jitted(low, "extend")(x, state, jnp.zeros(2, int))
    assert out.dtype == jnp.bfloat16
    assert state.state.dtype == jnp.float32
    assert state.history.keys.dtype == jnp.bfloat16
    want, want_state = _jitted(exact, "extend")(
        x.astype(jnp.float32), exact.init_state(2), jnp.zeros(2, int)
    )
    assert_close(out.astype(jnp.float32), want, 0.03, "output")
    assert_close(state.state, want_state.state, 0.02, "state")


def test_dropout_needs_a_key_and_is_unbiased():
    layer, x = _layer(LizaConfig(writes="all", dropout=0.5, chunk_size=4)), _inputs()
    graphdef, state = nnx.split(layer)
    run = quick_jit(lambda key: nnx.merge(graphdef, state)(x, dropout_key=key))
    plain = _jitted(_layer(LizaConfig(writes="all", chunk_size=4)))(x)
    assert_allclose(_jitted(layer)(x), plain, atol=1e-6)
    samples = np.stack([run(jax.random.key(seed)) for seed in range(400)])
    assert_array_equal(samples[0], run(jax.random.key(0)))
    error = np.abs(samples.mean(0) - plain) / (samples.std(0) / 20)
    assert np.sqrt((error**2).mean()) < 1.2
    assert samples.std(0).min() > 0


class Classifier(nnx.Module):
    """Somebody else's model."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, EMBED, rngs=rngs)
        self.attention = LinearAttention(
            EMBED, 3, config=LizaConfig(writes="all", chunk_size=8), rngs=rngs
        )
        self.head = nnx.Linear(EMBED, 12, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.attention(x))


def test_a_users_model_learns_to_recall():
    # Pairs (key, value), then a key: only a memory knows its value.
    rng = np.random.default_rng(0)
    keys = np.stack([rng.permutation(6)[:4] for _ in range(64)])
    values = rng.integers(6, 12, keys.shape)
    asked = rng.integers(0, 4, 64)
    pairs = np.stack([keys, values], axis=-1).reshape(64, 8)
    tokens = np.concatenate([pairs, keys[np.arange(64), asked][:, None]], axis=1)
    answers = values[np.arange(64), asked]
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def loss_of(model):
        logits = model(jnp.asarray(tokens))[:, -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    # Guessing among the six values costs log 6 = 1.79.
    assert losses[0] > 1.7
    assert losses[-1] < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim .24. is no multiple of num_heads .5.: give head_dim"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads .4. must be a multiple of .*3"),
    ],
    ids=["width", "groups"],
)
def test_heads_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(EMBED, rngs=nnx.Rngs(0), **options)


def test_biases_are_added_once():
    layer, x = _layer(use_bias=True), _inputs()
    plain = LinearAttention(EMBED, HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, rngs=nnx.Rngs(0))
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer, name).bias[...] = jnp.zeros_like(getattr(layer, name).bias[...])
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(plain, name).kernel[...] = getattr(layer, name).kernel[...]
    assert_allclose(_jitted(layer)(x), _jitted(plain)(x) + layer.o_proj.bias[...], atol=1e-5)
