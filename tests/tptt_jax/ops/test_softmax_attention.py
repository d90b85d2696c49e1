"""Softmax attention against loops over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import QUICK, quick_jit
from tptt_jax.config import RopeConfig
from tptt_jax.ops.attention import KeyValues, attend, attend_sequence
from tptt_jax.ops.attention.rope import rotary_angles, rotate
from tptt_jax.ops.documents import segment_starts

T, HEADS, KV_HEADS, DIM = 19, 4, 2, 6
SCALE = 0.6
# The window's rule: padding lies at the ends of documents.
IDS = np.array([[3] * 8 + [1] * 9 + [0] * 2, [0] + [2] * 18])
STATIC = ("window", "scale", "softcap", "block")
run_rows = quick_jit(attend_sequence, static_argnames=STATIC)


def attend_rows(*args, **options):
    """The output alone; test_log_mass.py is about the other result."""
    return run_rows(*args, **options).out


def _inputs(length=T, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _slow(q, k, v, ids, *, window=None, softcap=None, sinks=0, sink_q=None):
    """Every query's own list of keys; the first `sinks` keys of its document always belong."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, t, head in np.ndindex(q.shape[:3]):
        if not ids[row, t]:
            continue
        document = [s for s in range(t + 1) if ids[row, s] == ids[row, t]]
        first = document[:sinks]
        recent = [s for s in document if s not in first and (window is None or s > t - window)]
        group = head // (HEADS // KV_HEADS)
        queries = [sink_q if s in first else q for s in first + recent]
        logits = np.array(
            [
                SCALE * (np.asarray(query, np.float64)[row, t, head] @ k[row, s, group])
                for query, s in zip(queries, first + recent, strict=True)
            ]
        )
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        out[row, t, head] = (weights / weights.sum()) @ v[row, first + recent, group]
    return out


def _sinks(k, v, ids, count, queries, *, per_token):
    """The first tokens of every token's document, as an attention layer passes them."""
    starts = [[list(row).index(document) for document in row] for row in ids]
    index = np.array(starts)[..., None] + np.arange(count)
    visible = (index <= np.arange(ids.shape[1])[:, None]) & (ids != 0)[..., None]
    index = np.minimum(index, ids.shape[1] - 1)
    if not per_token:
        index = index[:, -1]
    rows = np.arange(len(ids)).reshape(-1, *(1,) * (index.ndim - 1))
    return KeyValues(k[rows, index], v[rows, index], jnp.asarray(visible), queries)


WINDOWS = {"all": {}, "window": {"window": 5}, "one": {"window": 1}, "cap": {"softcap": 1.5}}


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "one block"])
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_rows_equal_loops(options, block):
    args = _inputs()
    got = attend_rows(*args, segment_ids=jnp.asarray(IDS), scale=SCALE, block=block, **options)
    assert_allclose(got, _slow(*args, IDS, **options), atol=1e-5)
    assert not np.asarray(got)[IDS == 0].any()


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "one block"])
@pytest.mark.parametrize("window", [None, 30, 5], ids=["all", "longer than the row", "window"])
def test_without_ids_a_row_is_one_document(window, block):
    args = _inputs()
    got = attend_rows(*args, window=window, scale=SCALE, block=block)
    assert_allclose(got, _slow(*args, np.ones((2, T)), window=window), atol=1e-5)


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "one block"])
@pytest.mark.parametrize("per_token", [True, False], ids=["packed", "one document"])
def test_sinks_stay_visible_and_count_once(per_token, block):
    args, ids = _inputs(), IDS if per_token else np.ones((2, T), int)
    sink_q = _inputs(seed=1)[0]
    sinks = _sinks(*args[1:], ids, 3, sink_q, per_token=per_token)
    options = {"segment_ids": jnp.asarray(ids), "window": 4, "scale": SCALE}
    got = attend_rows(*args, **options, sinks=sinks, block=block)
    want = _slow(*args, ids, window=4, sinks=3, sink_q=sink_q)
    assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "window"), [(515, None), (515, 100), (1024, 3)], ids=["all", "window", "even"]
)
def test_long_rows_equal_short_blocks(length, window):
    # The default block holds 512 queries.
    args = _inputs(length)
    ids = jnp.asarray(np.repeat([1, 2], [300, length - 300]))[None]
    options = {"segment_ids": ids, "window": window, "scale": SCALE}
    got = attend_rows(*args, **options)
    assert_allclose(got, attend_rows(*args, **options, block=2048), atol=1e-6)
    assert_allclose(got, attend_rows(*args, **options, block=4), atol=1e-6)


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "one block"])
@pytest.mark.parametrize(("first", "window"), [(0, None), (0, 5), (5, 5), (9, 3)])
def test_queries_may_follow_keys_of_earlier_tokens(first, window, block):
    q, k, v = _inputs()
    ids = jnp.asarray(IDS)
    last, starts = 8, segment_starts(ids)
    got = attend_rows(
        q[:, -last:],
        k[:, first:],
        v[:, first:],
        segment_ids=ids[:, first:],
        starts=starts[:, -last:] - (T - last),
        window=window,
        scale=SCALE,
        block=block,
    )
    want = attend_rows(q, k, v, segment_ids=ids, window=window, scale=SCALE)
    assert_allclose(got, want[:, -last:], atol=1e-6)


def test_gradients_do_not_depend_on_the_block():
    args = _inputs()

    def gradients(block):
        def loss(q, k, v, sink_q):
            sinks = _sinks(k, v, IDS, 3, sink_q, per_token=True)
            out = attend_sequence(
                q,
                k,
                v,
                segment_ids=jnp.asarray(IDS),
                window=4,
                sinks=sinks,
                scale=SCALE,
                softcap=2.0,
                block=block,
            ).out
            return jnp.sum(jnp.sin(out + jnp.arange(DIM)))

        return quick_jit(jax.grad(loss, (0, 1, 2, 3)))(*args, args[0])

    for small, large in zip(gradients(4), gradients(512), strict=True):
        assert bool(jnp.any(large != 0))
        assert_allclose(small, large, atol=1e-5)


@pytest.mark.parametrize("window", [None, 150, 20], ids=["all", "beyond a piece", "window"])
def test_pieces_equal_a_scan_over_blocks(window):
    # 300 queries are pieces of 128, 128 and 44; ten blocks of 32 are scanned.
    args, sink_q = _inputs(300), _inputs(300, seed=1)[0]
    ids = np.repeat([[1, 2, 0]], [170, 110, 20], axis=1).repeat(2, axis=0)

    def loss(q, k, v, sink_q, block):
        sinks = None if window is None else _sinks(k, v, ids, 3, sink_q, per_token=True)
        out = attend_sequence(
            q,
            k,
            v,
            segment_ids=jnp.asarray(ids),
            window=window,
            sinks=sinks,
            scale=SCALE,
            block=block,
        ).out
        return jnp.sum(jnp.sin(out + jnp.arange(DIM))), out

    run = quick_jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), static_argnames="block")
    pieces, blocks = (run(*args, sink_q, block=block) for block in (512, 32))
    for mine, other in zip(jax.tree.leaves(pieces), jax.tree.leaves(blocks), strict=True):
        assert_allclose(mine, other, atol=2e-5, rtol=1e-5)


def test_parts_together_are_one_softmax():
    q, k, v = _inputs()
    mask = np.broadcast_to(np.tri(T, dtype=bool), (2, T, T))
    whole = attend(q, [KeyValues(k, v, jnp.asarray(mask))], scale=SCALE).out
    cuts = [slice(0, 3), slice(3, 11), slice(11, T)]
    parts = [KeyValues(k[:, cut], v[:, cut], jnp.asarray(mask[:, :, cut])) for cut in cuts]
    assert_allclose(attend(q, parts[::-1], scale=SCALE).out, whole, atol=1e-6)
    own = KeyValues(
        *(jnp.broadcast_to(x[:, None, :3], (2, T, 3, *x.shape[2:])) for x in (k, v)),
        parts[0].mask,
        q,
    )
    assert_allclose(attend(q, [own, *parts[1:]], scale=SCALE).out, whole, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    q, k, v = _inputs()
    none = jnp.zeros((2, T, T), bool)

    def total(q, k, v):
        return jnp.sum(attend(q, [KeyValues(k, v, none)], scale=SCALE).out)

    value, grads = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
    assert value == 0
    for grad in grads:
        assert_array_equal(grad, np.zeros(grad.shape))


def test_huge_logits_stay_finite():
    q, k, v = _inputs()
    out, grad = quick_jit(
        jax.value_and_grad(lambda q: jnp.sum(attend_sequence(q, k, v, scale=1e6, window=5).out))
    )(q)
    assert np.isfinite(out)
    assert np.isfinite(grad).all()
    hard = attend_rows(q, k, v, scale=1e6)
    logits = np.einsum("bthd,bshd->bhts", np.asarray(q), np.repeat(np.asarray(k), 2, axis=2))
    logits = np.where(np.tri(T, dtype=bool), logits, -np.inf)
    best = np.take_along_axis(
        np.repeat(np.asarray(v), 2, 2), np.moveaxis(logits.argmax(-1), 1, 2)[..., None], axis=1
    )
    assert_allclose(hard, best, atol=1e-5)


def test_low_precision_inputs_have_a_float32_softmax():
    args = _inputs(dtype=jnp.bfloat16)
    got = attend_rows(*args, segment_ids=jnp.asarray(IDS), scale=SCALE)
    assert got.dtype == jnp.bfloat16
    assert_allclose(got.astype(jnp.float32), _slow(*args, IDS), atol=0.03)


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "pieces"])
@pytest.mark.parametrize("window", [None, 70])
def test_rotations_that_are_still_needed(window, block):
    """Pieces of 128 queries, keys before the window left out, and whole rows in blocks."""
    args = _inputs(300)
    positions = jnp.asarray(np.random.default_rng(7).integers(0, 900, (2, 300)))
    angles = rotary_angles(positions, RopeConfig(), DIM)
    options = {"window": window, "scale": SCALE, "block": block}

    def ready(q, k, v):
        return attend_sequence(rotate(q, angles), rotate(k, angles), v, **options)

    def loss(run, *args):
        out = run(*args).out
        return jnp.sum(jnp.sin(out)), out

    def run(attention):
        step = jax.value_and_grad(functools.partial(loss, attention), (0, 1, 2), has_aux=True)
        (_, out), gradients = jax.jit(step, **QUICK)(*args)
        return out, *gradients

    late = run(functools.partial(attend_sequence, angles=angles, **options))
    for got, want in zip(late, run(ready), strict=True):
        assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    ("block", "length", "ends"),
    # Groups of three blocks, of two and a rest, and pieces.
    [(32, 384, (96, 192, 288)), (32, 140, (64, 128)), (512, 384, (128, 256))],
    ids=["blocks", "odd", "pieces"],
)
def test_what_comes_after_a_part_of_a_row_is_not_multiplied(block, length, ends):
    """Masked numbers count for nothing, but NaN times 0 is NaN: it shows what was multiplied."""
    q, k, v = _inputs(length)
    want = attend_rows(q, k, v, scale=SCALE, block=2048)
    for end in ends:
        got = attend_rows(q, k, v.at[:, end:].set(jnp.nan), scale=SCALE, block=block)
        assert_allclose(got[:, :end], want[:, :end], atol=1e-5)
        assert bool(jnp.all(jnp.isnan(got[:, end:])))


def test_many_large_values_do_not_overflow_in_half_precision():
    shape = (1, 2048, 1, 8)
    q, v = jnp.zeros(shape, jnp.float16), jnp.full(shape, 100, jnp.float16)
    got = attend_rows(q, q, v, scale=SCALE)
    assert_allclose(got.astype(jnp.float32), np.full(shape, 100), rtol=2e-3)


def test_memory_grows_with_the_window_and_not_with_its_square():
    def scratch(length):
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs(length)]
        run = jax.jit(attend_sequence, static_argnames=STATIC, **QUICK)
        compiled = run.lower(*args, window=16, scale=SCALE, block=64).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Two rows of 4 heads: the logits of one whole row alone would grow 16 times.
    assert scratch(4096) < 6 * scratch(1024)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_segment_starts_equal_a_loop(runs):
    ids = np.concatenate([np.repeat(*run) for run in runs])[:12]
    ids = np.pad(ids, (0, 12 - len(ids)))
    got = np.asarray(starts_of(jnp.asarray(ids[None])))[0]
    for t in np.flatnonzero(ids):
        start = t
        while start and ids[start - 1] == ids[t]:
            start -= 1
        assert got[t] == start


starts_of = quick_jit(segment_starts)
