"""Both results of softmax attention, output and log-sum-exp, against float64; traced windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.contracts import assert_close, quick_jit
from tptt_jax.ops.attention import KeyValues, attend, attend_sequence

T, HEADS, KV_HEADS, DIM = 19, 4, 2, 6
SCALE = 0.6
# The window's rule: padding lies at the ends of documents.
IDS = np.array([[3] * 8 + [1] * 9 + [0] * 2, [0] + [2] * 18])
LONG_IDS = np.repeat([[1, 2, 0]], [170, 110, 20], axis=1).repeat(2, axis=0)
CASES = {
    "all": {},
    "window": {"window": 5},
    "one": {"window": 1},
    "cap": {"softcap": 1.5},
    "window, sinks, cap": {"window": 4, "sinks": 3, "softcap": 2.0},
}


def _inputs(length=T, dtype=np.float32):
    """Queries, keys, values, and queries for the sinks."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def _starts(ids):
    """The first place of every token's document."""
    return np.array([[list(row).index(number) for number in row] for row in ids])


def _plain(q, k, v, sink_q, *, ids, window=None, sinks=0, softcap=None):
    """One matrix of logits, its softmax and its log-sum-exp, left to autodiff."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    query, key = np.arange(ids.shape[1])[:, None], np.arange(ids.shape[1])
    starts = _starts(ids)[:, :, None]
    document = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0) & (key <= query)
    is_sink = document & (key < starts + sinks)
    recent = document & ~is_sink & (True if window is None else key > query - window)
    logits = jnp.where(
        is_sink[:, None],
        jnp.einsum("bthd,bshd->bhts", sink_q, k),
        jnp.einsum("bthd,bshd->bhts", q, k),
    )
    logits = SCALE * logits
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    mask = (is_sink | recent)[:, None]
    # Padding sees nothing: any finite logit will do, as its results do not count.
    logits = jnp.where(mask | ~mask.any(-1, keepdims=True), logits, -jnp.inf)
    mass = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", jnp.exp(logits - mass[..., None]), v)
    return out, jnp.moveaxis(mass, 1, 2)


def _sinks(k, v, ids, count, queries):
    """The first tokens of every token's document, as an attention layer passes them."""
    index = _starts(ids)[..., None] + np.arange(count)
    visible = (index <= np.arange(ids.shape[1])[:, None]) & (ids != 0)[..., None]
    index, rows = np.minimum(index, ids.shape[1] - 1), np.arange(len(ids))[:, None, None]
    return KeyValues(k[rows, index], v[rows, index], jnp.asarray(visible), queries)


def _ours(q, k, v, sink_q, *, ids, sinks=0, **options):
    own = _sinks(k, v, ids, sinks, sink_q) if sinks else None
    return attend_sequence(q, k, v, segment_ids=jnp.asarray(ids), sinks=own, scale=SCALE, **options)


def _run(function, args, ids):
    """Gradients of a loss that needs both results where they count, and the results."""
    valid = (ids != 0)[..., None]
    weights = np.random.default_rng(2).standard_normal((*ids.shape, HEADS)) * valid

    def loss(args):
        out, mass = function(*args)
        total = jnp.sum(jnp.sin(out + jnp.arange(DIM)) * weights[..., None])
        # What padding holds must not count, not even times zero.
        return total + jnp.sum(jnp.cos(jnp.where(valid, mass, 0)) * weights), (out, mass)

    return jax.grad(loss, has_aux=True)(args)


def _compiled(function, ids):
    return quick_jit(lambda args: _run(function, args, ids))


def _compare(got, want, ids):
    got, want = jax.tree.map(np.asarray, (got, want))
    (gradients, (out, mass)), (want_gradients, (want_out, want_mass)) = got, want
    valid = ids != 0
    assert not out[~valid].any()
    assert_close(out[valid], want_out[valid], 1e-5, "output")
    assert_close(mass[valid], want_mass[valid], 1e-5, "log mass")
    names = ("queries", "keys", "values", "queries for sinks")
    for name, mine, wanted in zip(names, gradients, want_gradients, strict=True):
        assert mine.dtype == np.float32
        assert_close(mine, wanted, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "one piece"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_results_and_gradients_equal_a_plain_softmax_in_float64(options, block):
    got = _compiled(functools.partial(_ours, ids=IDS, block=block, **options), IDS)(_inputs())
    with jax.enable_x64(True):
        exact = _inputs(dtype=np.float64)
        want = _compiled(functools.partial(_plain, ids=IDS, **options), IDS)(exact)
        assert want[1][1].dtype == np.float64
    _compare(got, want, IDS)


@pytest.mark.parametrize("block", [32, 512], ids=["blocks", "pieces"])
@pytest.mark.parametrize("options", [{}, {"window": 70, "sinks": 3}], ids=["all", "window, sinks"])
def test_long_rows_equal_a_plain_softmax(options, block):
    # 300 queries are pieces of 128, 128 and 44; ten blocks of 32 are scanned.
    options = {"ids": LONG_IDS} | options
    ours = functools.partial(_ours, block=block, **options)
    got = _compiled(ours, LONG_IDS)(_inputs(300))
    with jax.enable_x64(True):
        exact = _inputs(300, np.float64)
        want = _compiled(functools.partial(_plain, **options), LONG_IDS)(exact)
    _compare(got, want, LONG_IDS)


@pytest.mark.parametrize("block", [4, 512], ids=["blocks", "one piece"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_traced_window_equals_a_static_one_and_compiles_once(sinks, block):
    ours = functools.partial(_ours, ids=IDS, sinks=sinks, block=block)

    @quick_jit
    def traced(args, window):
        return _run(functools.partial(ours, window=7, narrower=window), args, IDS)

    for window in (1, 4, 7):
        static = _compiled(functools.partial(ours, window=window), IDS)
        _compare(traced(_inputs(), jnp.asarray(window)), static(_inputs()), IDS)
    assert traced._cache_size() == 1


def test_a_traced_window_leaves_out_what_lies_between_it_and_the_static_one():
    """Pieces and blocks are cut for the static window, here beyond a piece."""
    args = _inputs(300)
    for block in (32, 512):
        options = {"ids": LONG_IDS, "sinks": 3, "block": block}
        got = quick_jit(
            lambda *args, options=options: _ours(*args[:4], window=150, narrower=args[4], **options)
        )(*args, jnp.asarray(20))
        with jax.enable_x64(True):
            exact = _inputs(300, np.float64)
            want = _plain(*exact, ids=LONG_IDS, window=20, sinks=3)
        valid = LONG_IDS != 0
        for mine, wanted in zip(got, want, strict=True):
            assert_close(np.asarray(mine)[valid], np.asarray(wanted)[valid], 1e-5, f"block {block}")


def test_parts_have_one_log_mass_together():
    q, k, v, _ = _inputs()
    mask = np.broadcast_to(np.tri(T, dtype=bool), (2, T, T))
    whole = attend(q, [KeyValues(k, v, jnp.asarray(mask))], scale=SCALE).log_mass
    cuts = [slice(0, 3), slice(3, 11), slice(11, T)]
    parts = [KeyValues(k[:, cut], v[:, cut], jnp.asarray(mask[:, :, cut])) for cut in cuts]
    masses = [attend(q, [part], scale=SCALE).log_mass for part in parts]
    assert_allclose(attend(q, parts[::-1], scale=SCALE).log_mass, whole, atol=1e-5)
    assert_allclose(jax.nn.logsumexp(jnp.stack(masses), axis=0), whole, atol=1e-5)


def test_a_query_that_sees_nothing_has_almost_no_mass():
    q, k, v, _ = _inputs()
    none = jnp.zeros((2, T, T), bool)
    _, mass = attend(q, [KeyValues(k, v, none)], scale=SCALE)
    assert np.isfinite(mass).all()
    assert np.max(mass) < -1e29

    def total(q, k, v):
        return jnp.sum(attend(q, [KeyValues(k, v, none)], scale=SCALE).log_mass)

    for gradient in jax.grad(total, (0, 1, 2))(q, k, v):
        assert not np.asarray(gradient).any()


def test_the_log_mass_of_huge_logits_is_the_largest_one():
    q, k, v, _ = _inputs()
    mass = attend_sequence(q, k, v, scale=1e6).log_mass
    logits = np.einsum("bthd,bshd->bths", q.astype(np.float64), np.repeat(k, 2, axis=2)) * 1e6
    largest = np.where(np.tri(T, dtype=bool)[:, None], logits, -np.inf).max(-1)
    assert_close(mass, largest, 1e-5, "log mass")


def test_low_precision_inputs_have_a_float32_log_mass():
    args = [jnp.asarray(x, jnp.bfloat16) for x in _inputs()]
    got = quick_jit(functools.partial(_ours, ids=IDS, window=5, sinks=2))(*args)
    assert got.out.dtype == jnp.bfloat16
    assert got.log_mass.dtype == jnp.float32
    # The same rounded inputs: only products are rounded, and sums of them are not.
    wide = [x.astype(jnp.float32) for x in args]
    want = quick_jit(functools.partial(_plain, ids=IDS, window=5, sinks=2))(*wide)[1]
    valid = IDS != 0
    assert_allclose(got.log_mass[valid], want[valid], atol=0.03)
