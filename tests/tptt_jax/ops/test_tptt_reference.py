"""Our form of the package's operator against the package's, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts import assert_close, quick_jit
from tptt_jax.config import OPERATORS, LizaConfig
from tptt_jax.ops.tptt_reference import (
    INITIAL_STATE,
    RawTokens,
    attend_tptt_reference,
    extend_tptt_reference,
    history_length,
    largest_divisor,
)

torch = pytest.importorskip("torch", reason="compares with tptt in torch")
tptt = pytest.importorskip("tptt")

pytestmark = pytest.mark.parity

HEADS, KV_HEADS, DIM = 4, 2, 6
TRICKS = {"derivative": "dt", "rotary": "rot", "combined": "rdt"}
# The names of the package's modes, and orders and gates it has no name for.
RULES = {name: LizaConfig(writes="all", operator=name).recurrence for name in OPERATORS} | {
    "three derivatives": LizaConfig(writes="all", num_householder=3, alpha_gate="kv").recurrence,
    "three, combined, gelu": LizaConfig(
        writes="all",
        num_householder=3,
        trick="combined",
        alpha_gate="v",
        beta_gate="kv",
        state_activation="gelu",
    ).recurrence,
    "constant gates": LizaConfig(writes="all", num_householder=2, beta_gate="constant").recurrence,
}


def _inputs(length, seed=0, dim=DIM):
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return RawTokens(*(rng.standard_normal((2, length, n, dim)) for n in heads))


def _module(rule, chunk_size, dim=DIM, **options):
    """The package's layer without projections, in float64."""
    gate = {"constant": "c"}
    config = {
        "order": rule.num_householder,
        "trick": TRICKS[rule.trick],
        "alpha_gate": gate.get(rule.alpha_gate, rule.alpha_gate),
        "beta_gate": gate.get(rule.beta_gate, rule.beta_gate),
        "linear": rule.state_activation == "none",
    }
    layer = tptt.LinearAttention(
        HEADS * dim, HEADS, head_dim=dim, num_key_value_heads=KV_HEADS, shared_attn=True,
        operator_mode=None, recurrent_config=config, max_chunk_size=chunk_size,
        linear_precision=torch.float64, **options,
    )  # fmt: skip
    # Its constants are rounded to float32 even then.
    layer.double().pool_g.causal_conv.conv1d.weight.fill_(1 / 3)
    expander = layer.virtual_token_expander
    angle = torch.arange(expander.n, dtype=torch.float64) * (2 * torch.pi / expander.n)
    expander.rot_cos = torch.cos(angle).view(expander.rot_cos.shape)
    expander.rot_sin = torch.sin(angle).view(expander.rot_sin.shape)
    return layer


def _theirs(raw, rule, chunk_size, mask=None, cotangent=None, **options):
    """Output [B, T, H * D], and the gradients of raw if a cotangent is given."""
    inputs = [torch.tensor(x).flatten(2).requires_grad_() for x in raw]
    layer = _module(rule, chunk_size, raw.keys.shape[-1], **options)
    mask = None if mask is None else torch.as_tensor(mask)
    out = layer(inputs, attn_mask=mask, out_proj=torch.nn.Identity())
    if cotangent is None:
        return out.detach().numpy()
    out.backward(torch.tensor(cotangent))
    return out.detach().numpy(), [x.grad.numpy() for x in inputs]


def _normalized(raw, rule, chunk_size, **options):
    out = attend_tptt_reference(raw, rule, chunk_size=chunk_size, **options)
    out = out.reshape(*out.shape[:2], -1)
    return out / jnp.sqrt(jnp.mean(out * out, axis=-1, keepdims=True) + 1e-6)


@functools.cache
def _compiled(rule, chunk_size, **options):
    return quick_jit(
        lambda raw, ids: _normalized(raw, rule, chunk_size, segment_ids=ids, **options)
    )


def _ours(raw, rule, chunk_size, segment_ids=None, **options):
    """Ours with the RMS norm that the package's layer ends with."""
    return np.asarray(_compiled(rule, chunk_size, **options)(raw, segment_ids))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _value_and_gradients(raw, rule, chunk_size, cotangent):
    @quick_jit
    def run(raw):
        out, pullback = jax.vjp(lambda raw: _normalized(raw, rule, chunk_size), raw)
        return out, pullback(cotangent)[0]

    return run(raw)


CASES = [(name, 24, 8) for name in RULES]
# 37 tokens and at most 8 in a chunk are 37 chunks, in more than one block.
CASES += [
    (name, *sizes)
    for name in ("gated_delta_product", "three, combined, gelu")
    for sizes in ((37, 8), (5, 64), (1, 64))
]


@pytest.mark.parametrize(("name", "length", "chunk_size"), CASES, ids=str)
def test_output_and_gradients_are_the_packages(name, length, chunk_size):
    rule, raw = RULES[name], _inputs(length)
    cotangent = np.random.default_rng(1).standard_normal((2, length, HEADS * DIM))
    want, want_grads = _theirs(raw, rule, chunk_size, cotangent=cotangent)
    got, grads = _value_and_gradients(raw, rule, chunk_size, cotangent)
    assert_close(got, want, 1e-9, "output")
    for name, x, y in zip(raw._fields, grads, want_grads, strict=True):
        assert_close(x.reshape(y.shape), y, 1e-8, f"gradient of {name}")


def test_odd_head_dimension():
    rule, raw = RULES["delta_product_c"], _inputs(9, dim=5)
    assert_close(_ours(raw, rule, 64), _theirs(raw, rule, 64), 1e-9, "output")


MASKS = {
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    "inside": [1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1],
    "everywhere": [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
}


@pytest.mark.parametrize("name", ["delta_rule_v", "gated_delta_product"])
def test_padding_is_the_packages(name):
    mask, rule = np.array(list(MASKS.values())), RULES[name]
    raw = jax.tree.map(lambda *x: np.concatenate(x), _inputs(12), _inputs(12, seed=1))
    want = _theirs(raw, rule, 4, mask=mask)
    got = _ours(raw, rule, 4, segment_ids=jnp.array(mask))
    for layout, mine, theirs in zip(MASKS, got, want, strict=True):
        assert_close(mine, theirs, 1e-9, layout)


@pytest.mark.parametrize("name", ["delta_rule_gelu", "gated_delta_product"])
def test_both_directions(name):
    rule, raw = RULES[name], _inputs(12)
    want = _theirs(raw, rule, 4, bidirectional=True)
    assert_close(_ours(raw, rule, 4, bidirectional=True), want, 1e-9, "output")


@pytest.mark.parametrize("name", ["gated_delta_product", "delta_rule_gelu"])
def test_documents_in_a_row_do_not_see_each_other(name):
    """And a document whose first chunk is a whole one is what it is alone."""
    rule, raw, ids = RULES[name], _inputs(24), np.zeros((2, 24), int)
    ids[:, :7], ids[:, 8:16], ids[:, 16:] = 3, 1, 2
    got = _ours(raw, rule, 4, segment_ids=jnp.array(ids))
    for number in (1, 2):
        alone = jax.tree.map(lambda x, mine=ids[0] == number: x[:, mine], raw)
        want = _theirs(alone, rule, 4)
        assert_close(got[:, ids[0] == number], want, 1e-9, f"document {number}")
    # A document that starts inside a chunk.
    ids[:, :] = np.where(np.arange(24) < 9, 5, 6)
    first = _ours(raw, rule, 4, segment_ids=jnp.array(ids))
    other = jax.tree.map(lambda x: np.where((ids == 5)[:, :, None, None], 7 * x + 1, x), raw)
    second = _ours(other, rule, 4, segment_ids=jnp.array(ids))
    np.testing.assert_array_equal(first[:, 9:], second[:, 9:])
    assert np.abs(first[:, :9] - second[:, :9]).max() > 0.01
    alone = jax.tree.map(lambda x: x[:, 9:12], raw)
    assert_close(first[:, 9:12], _theirs(alone, rule, 4), 1e-9, "the rest of the chunk")


def _start(rule, chunk_size):
    size = history_length(rule, chunk_size)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    history = RawTokens(*(jnp.zeros((2, size, n, DIM)) for n in heads))
    return history, jnp.full((2, KV_HEADS, DIM, DIM), INITIAL_STATE)


@pytest.mark.parametrize("name", ["delta_rule_gelu", "delta_product_r", "gated_delta_product"])
def test_extending_is_one_call_on_whole_chunks(name):
    """Rows of different lengths, padding anywhere, and one token at a time."""
    rule, chunk_size, raw = RULES[name], 4, _inputs(8)
    extend = quick_jit(
        lambda raw, valid, history, state, length: extend_tptt_reference(
            raw, valid, rule, chunk_size=chunk_size, history=history, state=state, length=length
        )
    )
    want = quick_jit(lambda raw: attend_tptt_reference(raw, rule, chunk_size=chunk_size))(raw)
    for pieces in ([(3, 0), (0, 5), (1, 3), (4, 0)], [(1, 1)] * 8):
        (history, state), done = _start(rule, chunk_size), np.zeros(2, int)
        got, width = [[], []], max(map(max, pieces)) + (pieces[0] == (3, 0))
        for number, counts in enumerate(pieces):
            piece, valid = _inputs(width, seed=number + 9), np.zeros((2, width), bool)
            for row, count in enumerate(counts):
                places = np.sort(np.random.default_rng(number).permutation(width)[:count])
                valid[row, places] = True
                for new, whole in zip(piece, raw, strict=True):
                    new[row, places] = whole[row, done[row] : done[row] + count]
            out, history, state = extend(piece, valid, history, state, jnp.asarray(done))
            assert not np.asarray(out)[~valid].any()
            for row in range(2):
                got[row].append(np.asarray(out)[row, valid[row]])
            done += counts
        assert (done == 8).all()
        assert_close([np.concatenate(row) for row in got], want, 1e-9, str(pieces))
    assert_close(history.keys, raw.keys[:, -history_length(rule, 4) :], 1e-12, "history")


def test_the_state_is_kept_in_float32_for_half_precision():
    rule = RULES["delta_product"]
    raw = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), _inputs(16))
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), raw)
    run = quick_jit(lambda raw: attend_tptt_reference(raw, rule, chunk_size=8))
    assert run(raw).dtype == jnp.float32
    assert_close(run(raw), run(exact), 1e-4, "output")


@pytest.mark.parametrize(("length", "limit"), [(96, 64), (97, 64), (1, 8), (30, 8), (7, 64)])
def test_the_chunk_is_the_largest_divisor(length, limit):
    want = tptt.modeling_tptt.get_valid_chunk_size(length, limit)
    assert largest_divisor(length, limit) == want
