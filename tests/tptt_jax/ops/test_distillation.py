"""The divergence of two predictions, against all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.contracts import quick_jit
from tptt_jax.ops.distillation import token_divergence

ROWS, T, EMBED, VOCAB = 2, 5, 8, 31
divergence_of = quick_jit(
    token_divergence, static_argnames=("softcap", "vocab_axis", "vocab_at_a_time")
)


def _inputs(dtype=jnp.float32, size=3.0):
    """Logits up to about 30 in size: what is summed before the largest one came must shrink."""
    rng = np.random.default_rng(0)
    hidden, teacher = (size * rng.standard_normal((ROWS, T, EMBED)) for _ in range(2))
    head = rng.standard_normal((VOCAB, EMBED))
    return tuple(jnp.asarray(x, dtype) for x in (hidden, teacher, head))


def _plain(hidden, teacher, head, softcap):
    """KL(teacher || student), all logits at once."""
    logits = [x.astype(jnp.float32) @ head.astype(jnp.float32).T for x in (hidden, teacher)]
    if softcap is not None:
        logits = [softcap * jnp.tanh(x / softcap) for x in logits]
    student, wanted = (jax.nn.log_softmax(x) for x in logits)
    return jnp.sum(jnp.exp(wanted) * (wanted - student), axis=-1)


def _value_and_gradient(function, hidden):
    """Losses of every token, and the gradient of a sum that weighs them differently."""
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, T)))

    def weighted(hidden):
        losses = function(hidden)
        return jnp.sum(losses * weights), losses

    gradient, losses = quick_jit(jax.grad(weighted, has_aux=True))(hidden)
    return losses, gradient


@pytest.mark.parametrize("softcap", [None, 4.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab_axis", [0, 1], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", [None, 1, 7, 10, 30, 31, 64])
def test_equals_two_log_softmaxes(softcap, vocab_axis, dtype, block):
    hidden, teacher, head = _inputs(dtype)
    want, want_gradient = _value_and_gradient(lambda x: _plain(x, teacher, head, softcap), hidden)
    losses, gradient = _value_and_gradient(
        lambda x: token_divergence(
            x,
            teacher,
            head if vocab_axis == 0 else head.T,
            softcap=softcap,
            vocab_axis=vocab_axis,
            vocab_at_a_time=block,
        ),
        hidden,
    )
    assert losses.dtype == jnp.float32
    assert gradient.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_allclose(losses, want, atol=tolerance * float(jnp.max(want)))
    gradient, want_gradient = (x.astype(jnp.float32) for x in (gradient, want_gradient))
    assert_allclose(gradient, want_gradient, atol=tolerance * float(jnp.abs(want_gradient).max()))


def test_equal_predictions_have_no_divergence_and_no_gradient():
    hidden, _, head = _inputs()
    losses, gradient = _value_and_gradient(
        lambda x: token_divergence(x, hidden, head, vocab_at_a_time=7), hidden
    )
    assert_allclose(losses, np.zeros((ROWS, T)), atol=1e-5)
    assert_allclose(gradient, np.zeros(hidden.shape), atol=1e-5)


def test_it_is_not_the_divergence_the_other_way_round():
    hidden, teacher, head = _inputs()
    there, back = divergence_of(hidden, teacher, head), divergence_of(teacher, hidden, head)
    assert bool(jnp.all(there > 0))
    assert bool(jnp.all(jnp.abs(there - back) > 1e-3 * there))


def test_the_teacher_and_the_head_get_no_gradient():
    gradients = quick_jit(
        jax.grad(lambda *x: jnp.sum(token_divergence(*x)), argnums=(1, 2))
    )(*_inputs())  # fmt: skip
    for gradient in gradients:
        assert_array_equal(gradient, np.zeros(gradient.shape))


def test_huge_logits_stay_finite():
    hidden, teacher, head = _inputs(size=1e4)
    losses, gradient = _value_and_gradient(
        lambda x: token_divergence(x, teacher, head, vocab_at_a_time=7), hidden
    )
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    assert_allclose(losses, _plain(hidden, teacher, head, None), rtol=1e-5)


@pytest.mark.parametrize("block", [None, 2048])
def test_logits_of_the_whole_batch_are_never_held(block):
    tokens, vocab = 1024, 1 << 18
    hidden, head = jnp.zeros((2, tokens // 2, 8)), jnp.zeros((vocab, 8))

    def loss(hidden):
        return jnp.sum(token_divergence(hidden, hidden + 1, head, vocab_at_a_time=block))

    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile().memory_analysis()
    # A few arrays of a block of logits, where those of one model would take a gigabyte.
    assert memory.temp_size_in_bytes < tokens * vocab * 4 / 8
