import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.contracts import quick_jit
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.ops.cross_entropy import token_cross_entropy
from tptt_jax.training.loss import (
    Targets,
    causal_lm_loss,
    chunked_cross_entropy,
    next_token_targets,
)


def plain_loss(hidden, head, targets, softcap):
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets.tokens)
    return jnp.sum(losses * targets.weights)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize("size", [1, 5, 7, 64])
def test_slices_give_the_plain_loss_and_gradients(softcap, train_head, size):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, 7, 12))
    head = jax.random.normal(keys[1], (31, 12))
    targets = Targets(
        jax.random.randint(keys[2], (2, 7), 0, 31),
        jax.random.bernoulli(keys[3], 0.7, (2, 7)).astype(jnp.float32),
    )

    def sliced(hidden, head):
        return 3 * chunked_cross_entropy(
            hidden, head, targets, softcap=softcap, train_head=train_head, tokens_at_a_time=size
        )

    want, want_grads = jax.value_and_grad(
        lambda *x: 3 * plain_loss(*x, targets, softcap), argnums=(0, 1)
    )(hidden, head)
    np.testing.assert_allclose(sliced(hidden, head), want, rtol=1e-5)
    grads = jax.grad(sliced, argnums=(0, 1) if train_head else 0)(hidden, head)
    for got, expected in zip(grads if train_head else (grads,), want_grads, strict=False):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab_axis", [0, 1], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "block"), [(None, None), (None, 7), (None, 1), (3, 10), (3, 31), (1, 16)]
)
def test_blocks_of_the_vocabulary_give_the_plain_losses(softcap, vocab_axis, dtype, size, block):
    keys = jax.random.split(jax.random.key(0), 3)
    # Logits up to 60 in size: what is summed before the largest one came must shrink.
    hidden = (5 * jax.random.normal(keys[0], (2, 7, 12))).astype(dtype)
    head = jax.random.normal(keys[1], (31, 12)).astype(dtype)
    targets = Targets(jax.random.randint(keys[2], (2, 7), 0, 31), jnp.ones((2, 7)))

    def blocks(hidden):
        return chunked_cross_entropy(
            hidden,
            head if vocab_axis == 0 else head.T,
            targets,
            softcap=softcap,
            vocab_axis=vocab_axis,
            tokens_at_a_time=size,
            vocab_at_a_time=block,
        )

    want = jax.value_and_grad(lambda x: plain_loss(x, head, targets, softcap))(hidden)
    got = jax.jit(jax.value_and_grad(blocks))(hidden)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    scale = float(jnp.max(jnp.abs(want[1].astype(jnp.float32))))
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    np.testing.assert_allclose(
        *(x[1].astype(jnp.float32) for x in (got, want)), atol=tolerance * scale
    )


def test_blocks_of_the_vocabulary_are_all_that_is_held():
    hidden, head = jnp.zeros((2, 512, 8)), jnp.zeros((1 << 16, 8))
    targets = Targets(jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512)))

    def loss(hidden):
        return chunked_cross_entropy(hidden, head, targets)

    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 512 * (1 << 16) * 4 / 4


def test_logits_of_the_whole_batch_are_never_held():
    """The largest array of the compiled program is a slice of the logits."""
    hidden, head = jnp.zeros((2, 512, 8)), jnp.zeros((4096, 8))
    targets = Targets(jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512)))

    def loss(hidden):
        return chunked_cross_entropy(hidden, head, targets, tokens_at_a_time=16)

    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile().memory_analysis()
    whole = 2 * 512 * 4096 * 4
    assert memory.temp_size_in_bytes < whole / 4


def test_what_does_not_count_reaches_neither_loss_nor_gradient():
    """Not even where its hidden state is not finite."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (3, 9, 12)), jax.random.normal(keys[1], (31, 12))
    counts = jnp.asarray(np.arange(27).reshape(3, 9) % 4 == 1).at[1].set(False)
    targets = Targets(jax.random.randint(keys[2], (3, 9), 0, 31), counts.astype(jnp.float32))

    def loss(hidden, targets):
        return chunked_cross_entropy(hidden, head, targets)

    broken = jnp.where(counts[..., None], hidden, jnp.nan)
    got, gradient = jax.jit(jax.value_and_grad(loss))(broken, targets)
    want, wanted = jax.value_and_grad(lambda x: plain_loss(x, head, targets, None))(hidden)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    nothing = targets._replace(weights=jnp.zeros((3, 9)))
    got, gradient = jax.jit(jax.value_and_grad(loss))(broken, nothing)
    assert got == 0
    assert not gradient.any()


def test_targets_stay_inside_documents_and_masks():
    tokens = jnp.array([[5, 6, 7, 8, 9, 3]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    mask = jnp.array([[True, False, True, True, True, True]])
    targets = next_token_targets(tokens, segments, mask)
    # 5 -> 6 is masked, 6 -> 7 counts, 7 -> 8 crosses, 8 -> 9 counts, 9 -> padding.
    assert targets.weights.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert targets.tokens.tolist() == [[6, 7, 8, 9, 3, 0]]


def test_packed_loss_is_the_sum_of_the_documents():
    model = CausalLM(ModelConfig.tiny(), LizaConfig(writes="all"), LoraConfig(), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 23), 0, 97)
    segments = jnp.array([[1] * 9 + [2] * 11 + [0] * 3])
    graphdef, state = nnx.split(model)
    loss = quick_jit(lambda state, *batch: causal_lm_loss(nnx.merge(graphdef, state), *batch))
    packed, count = loss(state, tokens, segments)
    first, _ = loss(state, tokens[:, :9])
    second, _ = loss(state, tokens[:, 9:20])
    assert count == 8 + 10
    np.testing.assert_allclose(packed, first + second, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_losses_in_half_precision_are_possible_and_close(tied):
    """Logits rounded to bfloat16 gave a quarter of the tokens a probability above 1."""
    config = ModelConfig.tiny(tie_embeddings=tied)
    exact = CausalLM(config, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 2)
    head, axis = exact.head_matrix()
    tokens = jax.random.randint(keys[0], (2, 40), 0, config.vocab_size)
    # Hidden states that are sure of the token, as those of a trained model are.
    rows = head if axis == 0 else head.T
    hidden = (40 * rows[tokens]).astype(jnp.bfloat16)
    half = head.astype(jnp.bfloat16)
    options = {"vocab_axis": axis}
    got = token_cross_entropy(hidden, half, tokens, **options)
    want = token_cross_entropy(
        hidden.astype(jnp.float32), half.astype(jnp.float32), tokens, **options
    )
    assert got.dtype == jnp.float32
    assert float(got.min()) >= 0
    np.testing.assert_allclose(got, want, atol=2e-4)
    targets = Targets(tokens, jnp.ones(tokens.shape))
    total = chunked_cross_entropy(hidden, half, targets, train_head=True, **options)
    np.testing.assert_allclose(total, want.sum(), rtol=1e-3, atol=1e-3)
    # What is sampled from and ranked.
    low = CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = low.project_logits(hidden)
    assert logits.dtype == jnp.float32
    wide = hidden.astype(jnp.float32) @ (half if axis else half.T).astype(jnp.float32)
    np.testing.assert_allclose(logits, wide, rtol=1e-5, atol=1e-4)
    assert low(tokens).logits.dtype == jnp.bfloat16


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_gets_its_gradient_or_says_that_it_does_not(tied):
    model = CausalLM(ModelConfig.tiny(num_layers=1, tie_embeddings=tied), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 97)

    def loss(model, **options):
        return causal_lm_loss(model, tokens, **options)[0]

    with pytest.raises(ValueError, match="train_head=True"):
        nnx.grad(loss)(model)
    gradients = nnx.grad(lambda model: loss(model, train_head=True))(model)
    head = gradients["embed"]["embedding"] if tied else gradients["lm_head"]["kernel"]
    assert float(jnp.abs(head.get_value()).max()) > 0.01
    # A frozen head needs none.
    others = nnx.DiffState(0, lambda path, x: "stacks" in path)
    some = nnx.jit(nnx.grad(loss, argnums=others))(model)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(some))
