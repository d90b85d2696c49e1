"""The trial of the kernels against the recurrence; interpreted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tptt_jax.ops.test_delta_product import make_inputs
from tests.tptt_jax.ops.test_delta_product_kernel import half_precision
from tptt_jax import CausalLM, LinearAttention, LizaConfig, ModelConfig, init_cache, warm_up
from tptt_jax.ops import chunk_delta_product, warm_up_kernels
from tptt_jax.ops.delta_product import choice as delta_product_choice
from tptt_jax.ops.delta_product import trial as kernel_trial
from tptt_jax.ops.delta_product.kernel import kernel_delta_product
from tptt_jax.ops.delta_product.kernel_kind import KernelKind
from tptt_jax.ops.delta_product.trial import kernels_agree
from tptt_jax.sharding import make_mesh

PLAIN = KernelKind(16, 16, 1, 1, "float32", per_channel=False, decay=False, documents=False)
KINDS = {
    "plain": PLAIN,
    "all": KernelKind(16, 16, 3, 2, "float32", per_channel=True, decay=True, documents=True),
    "odd": KernelKind(5, 24, 2, 3, "bfloat16", per_channel=False, decay=True, documents=False),
}


@pytest.fixture(autouse=True)
def untried():
    kernel_trial._PROBLEMS.clear()
    yield
    kernel_trial._PROBLEMS.clear()


@pytest.fixture
def on_hopper(monkeypatch):
    """A GPU that runs kernels as an interpreter does."""
    monkeypatch.setattr(delta_product_choice, "compute_capability", lambda *_: (9, 0))


def break_kernels(monkeypatch, spoil):
    """Lets `spoil` have q, k and v before the kernels get them."""

    def broken(q, k, v, *others):
        return kernel_delta_product(*spoil(q, k, v), *others)

    monkeypatch.setattr(kernel_trial, "kernel_delta_product", broken)


@pytest.mark.parametrize("name", KINDS)
def test_kernels_agree_with_the_recurrence(name):
    kind = KINDS[name]
    errors = kernel_trial._compare(kind)
    names = ["beta", "initial_state", "k", *(["log_decay"] if kind.decay else []), "q", "v"]
    assert set(errors) == {
        *(f"the gradient of {name}" for name in names),
        "the output",
        "the state",
    }
    # Rounded to bfloat16, so neither the same nor far away.
    assert all(1e-4 < error < 2e-2 for error in errors.values()), errors
    assert kernels_agree(kind)


@pytest.mark.filterwarnings("error")
def test_one_trial_a_kind(monkeypatch):
    assert kernels_agree(PLAIN)
    monkeypatch.setattr(kernel_trial, "_compare", None)
    assert kernels_agree(PLAIN)
    with pytest.raises(UserWarning, match="not callable"):
        kernels_agree(KINDS["odd"])


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_wrong_chunk_of_one_head_is_said(monkeypatch, chunk):
    here = (1, slice(64 * chunk, 64 * chunk + 64), 1)
    break_kernels(monkeypatch, lambda q, k, v: (q.at[here].multiply(1.5), k, v))
    with pytest.warns(UserWarning, match=r"kernels .* fail .*the output differs by 2\d.*%") as said:
        assert not kernels_agree(PLAIN)
    assert str(PLAIN) in str(said[0].message)


def test_a_wrong_gradient_alone_is_said(monkeypatch):
    def stop(q, k, v):
        return q, k.at[:, 192:].set(jax.lax.stop_gradient(k[:, 192:])), v

    break_kernels(monkeypatch, stop)
    alone = r"cpu: the gradient of k differs by 100% \(KernelKind.*TPTT_JAX_PALLAS=0"
    with pytest.warns(UserWarning, match=alone):
        assert not kernels_agree(PLAIN)


def test_nan_is_no_agreement(monkeypatch):
    break_kernels(monkeypatch, lambda q, k, v: (q, k, v * jnp.nan))
    with pytest.warns(UserWarning, match="the output differs by nan%"):
        assert not kernels_agree(PLAIN)


def test_kernels_that_do_not_compile_are_no_error(monkeypatch):
    """Pallas refuses to compile for a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(UserWarning, match="ValueError: Only interpret mode is supported on CPU"):
        assert not kernels_agree(PLAIN)


def test_nothing_to_compare_with(monkeypatch):
    def stop(*args):
        raise MemoryError("out of memory")

    monkeypatch.setattr(kernel_trial, "naive_delta_product", stop)
    with pytest.warns(UserWarning, match="nothing to compare them with, out of memory"):
        assert not kernels_agree(PLAIN)


def test_several_processes_do_not_choose_apart(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert kernels_agree(PLAIN)
    break_kernels(monkeypatch, lambda q, k, v: (2 * q, k, v))
    kernel_trial._PROBLEMS.clear()
    with pytest.raises(RuntimeError, match="Set TPTT_JAX_PALLAS=0 in all processes"):
        kernels_agree(PLAIN)


def small_inputs(**options):
    return half_precision(make_inputs(40, steps=1, dim=16, value_dim=16, **options))


def traced(inputs, **arguments):
    return str(jax.make_jaxpr(lambda x: chunk_delta_product(**x, **arguments))(inputs))


def test_the_operator_takes_kernels_that_were_tried(on_hopper, monkeypatch):
    """With a mesh, precisions and a loop around it."""
    inputs = small_inputs(decay=True)

    def loop(inputs):
        def body(carry, _):
            return carry + chunk_delta_product(**inputs)[0].astype(jnp.float32), None

        zeros = jnp.zeros(inputs["q"].shape, jnp.float32)
        return jax.lax.scan(jax.checkpoint(body), zeros, length=1)[0]

    with (
        jax.set_mesh(make_mesh("data=1")),
        jax.default_matmul_precision("highest"),
        jax.enable_x64(True),
        jax.debug_nans(True),
    ):
        assert list(warm_up_kernels(loop, inputs).values()) == [True]
        # Later traces, of whatever is compiled, try nothing.
        monkeypatch.setattr(kernel_trial, "_find_problem", None)
        assert str(jax.make_jaxpr(loop)(inputs)).count("pallas_call") == 3
        got = jax.jit(loop)(inputs)
    want = chunk_delta_product(**inputs, implementation="xla")[0]
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


def test_nothing_is_tried_while_a_function_is_traced(on_hopper, monkeypatch):
    monkeypatch.setattr(kernel_trial, "_find_problem", None)
    with pytest.warns(
        UserWarning, match=r"not tried before.* Call tptt_jax.warm_up\(model\) first"
    ):
        assert "pallas_call" not in traced(small_inputs())
    tried = []
    monkeypatch.setattr(kernel_trial, "_find_problem", tried.append)
    # Outside of a trace the first call is the trial.
    chunk_delta_product(**small_inputs())
    assert len(tried) == 1
    assert "pallas_call" in traced(small_inputs())
    assert warm_up_kernels(lambda x: chunk_delta_product(**x), small_inputs()) == {tried[0]: True}
    assert len(tried) == 1


@pytest.mark.parametrize("setting", ["0", "1", None])
def test_a_warm_up_tries_nothing_where_it_could_not_matter(setting, monkeypatch):
    if setting is not None:
        monkeypatch.setattr(delta_product_choice, "compute_capability", lambda *_: (9, 0))
        monkeypatch.setenv("TPTT_JAX_PALLAS", setting)
    assert warm_up_kernels(None) == {}


def test_the_warm_up_of_a_model_finds_the_kernels_of_every_call(on_hopper, monkeypatch):
    monkeypatch.setattr(kernel_trial, "_find_problem", lambda kind: None)
    config, liza = ModelConfig.tiny(num_layers=1), LizaConfig(softmax_window=8)
    model = CausalLM(config, liza, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kinds = warm_up(model)
    assert {(kind.dim, kind.steps, kind.group, kind.gate) for kind in kinds} == {
        (16, 1, 2, "float32")
    }
    # Evicted tokens have ids even if the row has none.
    assert all(kind.decay and kind.documents for kind in kinds)
    graphdef, weights = nnx.split(model)
    tokens, state = jnp.ones((2, 12), jnp.int32), init_cache(model, 2)
    monkeypatch.setattr(kernel_trial, "_find_problem", None)
    for ids in (None, tokens):
        for cache in (None, state):

            def call(weights, ids=ids, cache=cache):
                return nnx.merge(graphdef, weights)(tokens, ids, cache=cache).logits

            assert "pallas_call" in str(jax.make_jaxpr(call)(weights))


def test_the_operator_leaves_kernels_that_fail(on_hopper, monkeypatch):
    break_kernels(monkeypatch, lambda q, k, v: (2 * q, k, v))
    with pytest.warns(UserWarning, match="XLA's program is used"):
        warm_up_kernels(lambda x: chunk_delta_product(**x), small_inputs())
    assert "pallas_call" not in traced(small_inputs())
    monkeypatch.setenv("TPTT_JAX_PALLAS", "1")
    assert "pallas_call" in traced(small_inputs())


def test_each_kind_has_its_own_trial(on_hopper, monkeypatch):
    tried = []
    monkeypatch.setattr(kernel_trial, "kernels_agree", lambda kind: tried.append(kind) or True)
    ids = jnp.ones((2, 40), jnp.int32)
    for options, arguments in (
        ({}, {}),
        ({"decay": True, "heads": 6}, {"segment_ids": ids}),
        ({"vector": True}, {}),
    ):
        warm_up_kernels(
            lambda x, a=arguments: chunk_delta_product(**x, **a), small_inputs(**options)
        )
    assert [each[3:] for each in tried] == [
        (2, "bfloat16", False, False, False),
        (3, "bfloat16", False, True, True),
        (2, "bfloat16", True, False, False),
    ]
    assert all(each[:3] == (16, 16, 1) for each in tried)


def test_a_model_in_half_precision_has_gates_in_float32(on_hopper, monkeypatch):
    tried = []
    monkeypatch.setattr(kernel_trial, "kernels_agree", lambda kind: bool(tried.append(kind)))
    config = LizaConfig(writes="all", operator="gated_delta_product")
    layer = LinearAttention(32, 2, config=config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    warm_up_kernels(layer, jnp.ones((1, 9, 32), jnp.bfloat16))
    assert [each.gate for each in tried] == ["float32"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("dim", "per_channel"), [(64, False), (128, False), (128, True)])
def test_compiled_kernels_agree(dim, per_channel, steps):
    kind = KernelKind(
        dim, dim, steps, 4, "float32", per_channel=per_channel, decay=True, documents=True
    )
    assert all(error < 3e-2 for error in kernel_trial._compare(kind).values())
