"""The chunkwise form and the single step against the token recurrence in float64."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tptt_jax.ops import chunk_delta_product, naive_delta_product, step_delta_product
from tptt_jax.ops.delta_product.plan import OTHERS, SIZES, plan_chunks

NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
# Documents of odd lengths; padding on the left, between and inside documents, on the right.
RUNS = [
    [(0, 3), (7, 11), (0, 2), (7, 9), (2, 1), (7, 24), (1, 17), (0, 3)],
    [(1, 40), (3, 5), (0, 9), (1, 16)],
]
IDS = np.array([np.repeat(*zip(*runs, strict=True)) for runs in RUNS])
# Here compiling takes the time, not running.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
STATIC = ("chunk_size", "state_activation")
chunk = jax.jit(chunk_delta_product, static_argnames=STATIC, **QUICK)
naive = jax.jit(naive_delta_product, static_argnames="state_activation", **QUICK)
step = jax.jit(step_delta_product, **QUICK)


@pytest.fixture(autouse=True)
def chunks_as_they_are_asked_for(monkeypatch):
    """As on an accelerator: on CPU no chunk would have more than 16 tokens."""
    monkeypatch.setitem(SIZES, "cpu", OTHERS)


def make_inputs(length=70, *, heads=4, kv_heads=2, steps=2, dim=8, value_dim=8, batch=2, **options):
    """Normalised float64 inputs by name; without decay and state unless options ask for them."""
    rng = np.random.default_rng(options.get("seed", 0))
    q = rng.standard_normal((batch, length, heads, dim))
    k = rng.standard_normal((batch, length, steps, kv_heads, dim))
    # Neighbours resemble each other, as they do in text: a harder matrix to invert.
    k[:, 1:] += k[:, :-1]
    beta_shape = k.shape if options.get("vector") else k.shape[:-1]
    inputs = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((*k.shape[:-1], value_dim)),
        "beta": 1 / (1 + np.exp(-rng.standard_normal(beta_shape))),
    }
    if options.get("decay"):
        # Tokens that forget everything among tokens that forget next to nothing.
        scale = rng.choice([1e-3, 1e-1, 1.0, 50.0], (batch, length, kv_heads))
        inputs["log_decay"] = -scale * rng.random((batch, length, kv_heads))
    if options.get("state"):
        inputs["initial_state"] = rng.standard_normal((batch, kv_heads, dim, value_dim))
    return inputs


def cast(inputs, dtype=jnp.float32):
    return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def oracle(inputs, **options):
    """The token recurrence in float64, as numpy arrays."""
    with jax.enable_x64(True):
        return tuple(np.asarray(x) for x in naive(**cast(inputs, jnp.float64), **options))


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def assert_near(got, want, tolerance):
    for name, a, b in zip(("out", "state"), got, want, strict=True):
        assert relative_error(a, b) < tolerance, (name, relative_error(a, b))


def weigh(run, inputs, segment_ids):
    """A scalar that weighs every number of the output and the state differently, and both."""
    out, state = result = run(**inputs, segment_ids=segment_ids)
    loss = jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))
    loss += jnp.sum(state * jnp.sin(jnp.arange(state.size, dtype=state.dtype)).reshape(state.shape))
    return loss, result


def oracle_gradients(inputs, segment_ids):
    return jax.grad(lambda x: weigh(naive_delta_product, x, segment_ids), has_aux=True)(inputs)


def chunk_gradients(inputs, segment_ids, chunk_size):
    def run(**arguments):
        return chunk_delta_product(**arguments, chunk_size=chunk_size)

    return jax.grad(lambda x: weigh(run, x, segment_ids), has_aux=True)(inputs)


oracle_gradients = jax.jit(oracle_gradients, **QUICK)
chunk_gradients = jax.jit(chunk_gradients, static_argnames="chunk_size", **QUICK)


CASES = {
    "plain": {},
    "vector": {"vector": True, "state": True, "decay": True, "seed": 1},
    "packed": {"heads": 6, "value_dim": 5, "steps": 3, "state": True, "decay": True, "seed": 2},
}


def case(name):
    return make_inputs(**CASES[name]), jnp.asarray(IDS) if name == "packed" else None


@pytest.mark.parametrize(
    ("name", "chunk_sizes"), [("plain", [3]), ("vector", [128]), ("packed", [1, 16, 64])]
)
def test_values_and_every_gradient_equal_the_float64_recurrence(name, chunk_sizes):
    inputs, ids = case(name)
    with jax.enable_x64(True):
        exact = oracle_gradients(cast(inputs, jnp.float64), ids)
        want_gradients, want = jax.tree.map(np.asarray, exact)
    for chunk_size in chunk_sizes:
        gradients, got = chunk_gradients(cast(inputs), ids, chunk_size)
        assert_near(got, want, 1e-5)
        assert set(gradients) == set(inputs)
        for argument, gradient in gradients.items():
            error = relative_error(gradient, want_gradients[argument])
            assert error < 1e-4, (chunk_size, argument, error)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 128])
@pytest.mark.parametrize("name", CASES)
def test_result_does_not_depend_on_the_chunk_size(name, chunk_size):
    inputs, ids = case(name)
    got = chunk(**cast(inputs), segment_ids=ids, chunk_size=chunk_size)
    assert_near(got, oracle(inputs, segment_ids=ids), 1e-5)


@settings(deadline=None, max_examples=5)
@given(
    length=st.integers(1, 40),
    chunk_size=st.integers(1, 40),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    steps=st.integers(1, 4),
    dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    decay=st.booleans(),
)
def test_any_shape(length, chunk_size, kv_heads, group, **shape):
    inputs = make_inputs(length, heads=kv_heads * group, kv_heads=kv_heads, state=True, **shape)
    got = chunk(**cast(inputs), chunk_size=chunk_size)
    assert_near(got, oracle(inputs), 1e-5)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(
        st.lists(st.integers(0, 2), min_size=13, max_size=13), min_size=2, max_size=2
    ).filter(lambda rows: np.any(rows))
)
def test_any_documents_and_padding(rows):
    ids = jnp.asarray(rows)
    inputs = make_inputs(13, state=True, decay=True)
    got = chunk(**cast(inputs), segment_ids=ids, chunk_size=4)
    want = oracle(inputs, segment_ids=ids)
    assert_near(got, want, 1e-5)
    assert not np.asarray(got[0])[np.array(rows) == 0].any()


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_any_split_equals_the_whole(vector):
    inputs = cast(make_inputs(53, decay=True, state=True, vector=vector))
    want = [np.asarray(x, np.float64) for x in chunk(**inputs, chunk_size=16)]
    state, by_time = inputs.pop("initial_state"), inputs
    for ends in ([0, 20, 33, 53], [0, 1, 21, 41, 53]):
        carried, outs = state, []
        for begin, end in itertools.pairwise(ends):
            part = {name: x[:, begin:end] for name, x in by_time.items()}
            out, carried = chunk(**part, initial_state=carried, chunk_size=16)
            outs.append(out)
        assert_near((jnp.concatenate(outs, axis=1), carried), want, 1e-5)
    carried, outs = state, []
    for t in range(53):
        out, carried = step(**{name: x[:, t] for name, x in by_time.items()}, state=carried)
        outs.append(out)
    assert_near((jnp.stack(outs, axis=1), carried), want, 1e-5)


@pytest.mark.parametrize("positions", [range(7), range(53, 60), (0, 9, 10, 30, 31, 32, 59)])
def test_padding_is_inert_even_when_it_is_nan(positions):
    inputs = cast(make_inputs(53, decay=True, state=True))
    valid = np.ones(60, bool)
    valid[list(positions)] = False
    want_gradients, want = chunk_gradients(inputs, None, 16)

    def pad(x):
        return jnp.full((2, 60, *x.shape[2:]), jnp.nan, x.dtype).at[:, valid].set(x)

    padded = {name: x if name == "initial_state" else pad(x) for name, x in inputs.items()}
    ids = jnp.asarray(np.broadcast_to(np.where(valid, 4, 0), (2, 60)))
    # The loss weighs outputs by their place, so compare through the same weights.
    out, state = chunk(**padded, segment_ids=ids, chunk_size=16)
    assert not np.asarray(out)[:, ~valid].any()
    assert_near((out[:, valid], state), [np.asarray(x, np.float64) for x in want], 1e-5)

    gradients = padded_gradients(padded, ids, jnp.flatnonzero(valid))
    for name, gradient in gradients.items():
        gradient = np.asarray(gradient)
        if name != "initial_state":
            assert np.array_equal(gradient[:, ~valid], np.zeros_like(gradient[:, ~valid])), name
            gradient = gradient[:, valid]
        assert relative_error(gradient, np.asarray(want_gradients[name], np.float64)) < 1e-4, name


def padded_gradients(inputs, segment_ids, kept):
    """Gradients of the loss over the output's kept tokens."""

    def run(**arguments):
        out, state = chunk_delta_product(**arguments, chunk_size=16)
        return out[:, kept], state

    return jax.grad(lambda x: weigh(run, x, segment_ids)[0])(inputs)


padded_gradients = jax.jit(padded_gradients, **QUICK)


def test_packed_documents_equal_separate_runs():
    inputs = cast(make_inputs(60, decay=True, batch=1))
    ids = jnp.asarray(np.repeat([3, 8, 3], 20)[None])
    out, state = chunk(**inputs, segment_ids=ids, chunk_size=16)
    parts = [
        chunk(**{name: x[:, begin : begin + 20] for name, x in inputs.items()}, chunk_size=16)
        for begin in (0, 20, 40)
    ]
    separate = jnp.concatenate([part[0] for part in parts], axis=1)
    want = [np.asarray(x, np.float64) for x in (separate, parts[-1][1])]
    assert_near((out, state), want, 1e-5)


def test_initial_state_belongs_to_the_first_document_only():
    inputs = cast(make_inputs(40, state=True))
    ids = jnp.asarray(np.repeat([[0, 1, 2], [2, 2, 2]], [4, 16, 20], axis=1))
    out, state = chunk(**inputs, segment_ids=ids, chunk_size=16)
    other, other_state = chunk(
        **inputs | {"initial_state": inputs["initial_state"] + 1}, segment_ids=ids, chunk_size=16
    )
    assert np.array_equal(out[0, 20:], other[0, 20:])
    assert np.array_equal(state[0], other_state[0])
    assert np.abs(out[0, 4:20] - other[0, 4:20]).min(axis=(1, 2)).max() > 1e-3
    assert np.abs(state[1] - other_state[1]).max() > 1e-3


def test_query_heads_of_a_group_share_a_state():
    inputs = cast(make_inputs(33, heads=6, kv_heads=2, decay=True, state=True))
    out, state = chunk(**inputs, chunk_size=16)
    axes = {"k": 3, "v": 3, "beta": 3, "log_decay": 2, "initial_state": 1}
    repeated = {
        name: jnp.repeat(x, 3, axis=axes[name]) if name in axes else x for name, x in inputs.items()
    }
    want, want_state = chunk(**repeated, chunk_size=16)
    assert_near((out, state), [np.asarray(x, np.float64) for x in (want, want_state[:, ::3])], 1e-5)


def test_bfloat16_inputs_keep_a_float32_state():
    inputs = cast(make_inputs(150, dim=32, value_dim=32, decay=True, state=True), jnp.bfloat16)
    out, state = jax.jit(chunk_delta_product)(**inputs)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    want = oracle({name: np.asarray(x, np.float64) for name, x in inputs.items()})
    assert relative_error(out, want[0]) < 1e-2
    # The state never passes through bfloat16.
    assert relative_error(state, want[1]) < 1e-5
    one = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
    first, after = step(**one, state=inputs["initial_state"])
    assert (first.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)


def test_small_chunks_in_blocks_as_a_cpu_likes_them_equal_the_recurrence(monkeypatch):
    monkeypatch.undo()
    inputs = make_inputs(301, vector=False, decay=True, state=True)
    ids = jnp.asarray(np.repeat([[1, 0, 2, 3]], [100, 5, 150, 46], axis=1).repeat(2, axis=0))
    size, blocks, chunks = plan_chunks(301, 64)
    assert (size, blocks > 1) == (16, True), "the plan has changed: does this still test blocks?"
    assert 301 <= size * blocks * chunks < 301 + size * blocks
    want_gradients, want = oracle_gradients(cast(inputs), ids)

    def loss(inputs):
        return weigh(lambda **x: chunk_delta_product(**x, chunk_size=64), inputs, ids)

    gradients, got = jax.jit(jax.grad(loss, has_aux=True), **QUICK)(cast(inputs))
    assert_near(got, oracle(inputs, segment_ids=ids), 1e-5)
    assert_near(got, [np.asarray(x, np.float64) for x in want], 1e-5)
    for name, gradient in gradients.items():
        assert relative_error(gradient, want_gradients[name]) < 1e-4, name


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 4096])
@pytest.mark.parametrize("exact", [False, True])
def test_a_plan_holds_the_row_and_little_more(length, exact, monkeypatch):
    monkeypatch.undo()
    size, blocks, chunks = plan_chunks(length, 64, exact=exact)
    assert length <= size * blocks * chunks < length + size * blocks
    assert size == min(length, 64 if exact else 16)


@pytest.mark.parametrize("log_decay", [-50.0, -1e4, -np.inf])
def test_very_strong_decay_has_no_nan(log_decay):
    inputs = make_inputs()
    inputs["log_decay"] = np.full((2, 70, 2), log_decay)
    # What decays least comes after what decays most: exp must not see a difference of sums.
    inputs["log_decay"][:, 30:] = -1e-3
    want = oracle(inputs)
    gradients, got = chunk_gradients(cast(inputs), None, 64)
    assert_near(got, want, 1e-5)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name


def test_equal_keys_with_the_strongest_gate_do_not_overflow():
    """Powers of the triangular matrix would reach 1e70 here."""
    inputs = make_inputs(batch=1)
    inputs["k"] = np.broadcast_to(inputs["k"][:, :1, :1], inputs["k"].shape)
    inputs["beta"] = np.full_like(inputs["beta"], 1.9)
    assert_near(chunk(**cast(inputs)), oracle(inputs), 2e-5)


@pytest.mark.parametrize("length", [32, 41])
def test_activation_follows_every_complete_chunk(length):
    inputs = make_inputs(length)
    marks = np.broadcast_to(np.arange(1, length + 1) % 16 == 0, (2, length))
    want = oracle(inputs, state_activation="gelu", activate_after=jnp.asarray(marks))
    assert_near(chunk(**cast(inputs), chunk_size=16, state_activation="gelu"), want, 1e-5)
    assert relative_error(chunk(**cast(inputs))[1], want[1]) > 0.1


def test_activation_has_finite_gradients_from_an_empty_memory():
    inputs = cast(make_inputs(32))
    # The first chunk writes nothing, so the activation sees rows of zeros.
    inputs["beta"] = inputs["beta"].at[:, :16].set(0)

    def loss(inputs):
        out, state = chunk_delta_product(**inputs, chunk_size=16, state_activation="gelu")
        return jnp.sum(out**2) + jnp.sum(state**2)

    for name, gradient in jax.jit(jax.grad(loss), **QUICK)(inputs).items():
        assert np.isfinite(gradient).all(), name


def test_memory_of_gradients_is_that_of_the_inputs_not_of_the_matrices():
    inputs = cast(make_inputs(4096, batch=1, heads=2, dim=16, value_dim=16))
    compiled = chunk_gradients.lower(inputs, None, 16).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    # The M x M matrices of all chunks would be 0.8 times the inputs each, and there are ten.
    assert temporaries < 3 * sum(x.nbytes for x in inputs.values())


def test_no_tokens_leave_the_state_alone():
    inputs = cast(make_inputs(5, state=True))
    empty = {name: x if name == "initial_state" else x[:, :0] for name, x in inputs.items()}
    out, state = chunk(**empty)
    assert out.shape == (2, 0, 4, 8)
    assert np.array_equal(state, inputs["initial_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 9, 8)}, r"q must have 4 axes .*got shape \(2, 9, 8\)"),
        ({"k": (2, 9, 2, 8)}, r"k must have 5 axes .*N = 1.*got shape \(2, 9, 2, 8\)"),
        ({"k": (2, 7, 2, 2, 8)}, r"k must have shape \(2, 9, 2, 2, 8\).*got \(2, 7, 2, 2, 8\)"),
        ({"q": (2, 9, 3, 8)}, r"multiple of its heads, got N = 2, H = 3 and K = 2"),
        ({"v": (2, 9, 1, 2, 8)}, r"v must have shape \(2, 9, 2, 2, 8\).*got \(2, 9, 1, 2, 8\)"),
        ({"beta": (2, 9, 2)}, r"beta must have shape \(2, 9, 2, 2\).*got \(2, 9, 2\)"),
        ({"beta": (2, 9, 2, 2, 1)}, r"beta must have shape \(2, 9, 2, 2, 8\)"),
        ({"beta": (2, 9, 2, 2, 8), "v": (2, 9, 2, 2, 5)}, r"D = 8.*got Dv = 5; use a beta of"),
        ({"log_decay": (2, 9, 4)}, r"log_decay must have shape \(2, 9, 2\).*got \(2, 9, 4\)"),
        ({"initial_state": (2, 4, 8, 8)}, r"state must have shape \(2, 2, 8, 8\)"),
        ({"segment_ids": (9,)}, r"segment_ids must have shape \(2, 9\).*got \(9,\)"),
        ({"segment_ids": (2, 9)}, r"segment_ids must be integers .*got float32"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    arguments = cast(make_inputs(9)) | {name: jnp.ones(shape) for name, shape in change.items()}
    for operator in (chunk_delta_product, naive_delta_product):
        with pytest.raises(ValueError, match=message):
            operator(**arguments)


def test_wrong_options_are_refused():
    inputs = cast(make_inputs(9))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunk_delta_product(**inputs, chunk_size=0)
    with pytest.raises(ValueError, match="one of none, gelu, got 'relu'"):
        chunk_delta_product(**inputs, state_activation="relu")
    one = {name: x[:, 0] for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"state must have shape \(2, 2, 8, 8\)"):
        step_delta_product(**one, state=jnp.zeros((2, 4, 8, 8)))
    with pytest.raises(
        ValueError, match=r"q \(of one token\) must have 3 axes .*got shape \(2, 1, 4, 8\)"
    ):
        step_delta_product(**one | {"q": inputs["q"][:, :1]}, state=jnp.zeros((2, 2, 8, 8)))
