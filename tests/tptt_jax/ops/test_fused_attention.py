"""The fused program against the one whose memory is bounded; cuDNN itself needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from tests.contracts import assert_close, assert_trees_close, quick_jit
from tptt_jax.decoder import REMAT_POLICIES
from tptt_jax.ops.attention import KeyValues, attend_sequence, can_fuse, fused_attention

TOKENS, DIM = 26, 8
IDS = {
    "one document": None,
    # The same id twice is two documents; the last row is all padding.
    "packed": np.array([[1] * 9 + [2] * 8 + [1] * 5 + [0] * 4, [4] * 26, [0] * 26]),
    "padding before": np.array([[0] * 6 + [1] * 13 + [2] * 7, [0] + [7] * 25, [5] + [0] * 25]),
}


def inputs(kv_heads=2, dtype=jnp.float32, tokens=TOKENS, dim=DIM):
    rng = np.random.default_rng(0)
    shapes = [(3, tokens, heads, dim) for heads in (4, kv_heads, kv_heads)]
    return [jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes]


def xla(*args, **options):
    return fused_attention(*args, implementation="xla", **options)


def bounded(*args, **options):
    return attend_sequence(*args, **options).out


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("window", [None, 2, 5, 100], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_bounded_attention_with_all_gradients(ids, window, kv_heads):
    args, weights = inputs(kv_heads), np.random.default_rng(1).standard_normal((3, TOKENS, 4, DIM))
    segment_ids = None if ids is None else jnp.asarray(ids)

    def run(attention):
        def weighted(*args):
            out = attention(*args, segment_ids=segment_ids, window=window, scale=0.3)
            return jnp.sum(out * weights), out

        return quick_jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(*args)

    (grads, out), (want_grads, want) = run(xla), run(bounded)
    assert_close(out, want, 1e-5, "output")
    assert_trees_close(grads, want_grads, 1e-5, "gradient of ")
    if ids is not None:
        assert not np.asarray(out)[ids == 0].any()
        assert all(not np.asarray(grad)[ids == 0].any() for grad in grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_stays_close(dtype):
    args, options = inputs(dtype=dtype), {"segment_ids": jnp.asarray(IDS["packed"]), "scale": 0.3}
    out = xla(*args, **options)
    assert out.dtype == dtype
    wide = bounded(*(x.astype(jnp.float32) for x in args), **options)
    assert_close(out, wide, 2e-2, "output")


@pytest.mark.gpu
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("window", [None, 5], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_cudnn_equals_bounded_attention(ids, window, dim):
    args = inputs(dtype=jnp.bfloat16, dim=dim)
    options = {"segment_ids": None if ids is None else jnp.asarray(ids), "window": window}
    assert can_fuse(args[0], segment_ids=options["segment_ids"], sinks=None, softcap=None)

    def run(attention):
        def loss(*args):
            out = attention(*args, **options, scale=0.1).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)

    (grads, out), (want_grads, want) = run(fused_attention), run(bounded)
    assert_close(out, want, 3e-2, "output")
    assert_trees_close(grads, want_grads, 3e-2, "gradient of ")


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def set_capability(capability):
        device = type("Device", (), {"compute_capability": capability})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    set_capability("8.0")
    return set_capability


def fuses(q, ids=None, sinks=None, softcap=None):
    return can_fuse(q, segment_ids=ids, sinks=sinks, softcap=softcap)


def test_nothing_is_fused_on_a_cpu():
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    assert not fuses(q)
    assert not fuses(q, jnp.ones((1, 64), jnp.int32))


def test_what_is_fused_on_a_gpu(on_gpu):
    def q(*, batch=2, tokens=64, dim=64, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((batch, tokens, 2, dim), dtype)

    def ids(x):
        return jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)

    assert fuses(q())
    assert fuses(q(), ids(q()))
    assert fuses(q(tokens=63, dim=128, dtype=jnp.float16))
    assert not fuses(q(tokens=63), ids(q(tokens=63)))
    assert not fuses(q(dim=36))
    assert not fuses(q(dim=256))
    assert not fuses(q(dtype=jnp.float32))
    assert not fuses(q(), softcap=50.0)
    assert not fuses(q(), sinks=KeyValues(*(jnp.zeros(()),) * 3))
    # Pairs of tokens must fit the memory; without documents there is nothing for each of them.
    assert fuses(q(tokens=1 << 13), ids(q(tokens=1 << 13)))
    assert not fuses(q(tokens=1 << 14), ids(q(tokens=1 << 14)))
    assert fuses(q(tokens=1 << 17))
    for capability, expected in (("7.5", False), ("10.0", True), ("gfx90a", False)):
        on_gpu(capability)
        assert fuses(q()) is expected


@pytest.mark.parametrize("ids", [None, "packed"], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [None, 5], ids=str)
def test_what_is_fused_passes_the_checks_for_cudnn(ids, window, monkeypatch):
    """Lowered for CUDA, forward and backward: JAX refuses what the kernels do not take."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)
    segment_ids = None if ids is None else jnp.asarray(IDS[ids])

    def loss(*args):
        out = fused_attention(*args, segment_ids=segment_ids, window=window, scale=0.3)
        return jnp.sum(out.astype(jnp.float32))

    for args in (inputs(dtype=jnp.bfloat16), inputs(dtype=jnp.float16, dim=128)):
        lowered = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",))
        bias = "ScaleBias" if ids else ""
        for direction in ("", "Backward"):
            assert f"__cudnn$fmha{bias}Softmax{direction}" in lowered.as_text()


@pytest.mark.parametrize(("remat", "kernels"), [("none", 2), ("full", 3)])
def test_the_gradient_of_a_layer_runs_the_forward_kernel_again_only_if_told(
    remat, kernels, monkeypatch
):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)

    def layer(q, k, v):
        return fused_attention(jnp.sin(q), k, v, scale=0.3)

    def loss(*args):
        out = jax.checkpoint(layer, policy=REMAT_POLICIES[remat])(*args)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    args = inputs(dtype=jnp.bfloat16)
    lowered = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__cudnn$fmha") == kernels
