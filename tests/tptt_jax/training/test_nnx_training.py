"""Training as NNX users do it: variable types, nnx.Optimizer, train() and eval()."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from tests.contracts import logits_of, random_tokens
from tptt_jax import (
    AdapterParam,
    BaseParam,
    CausalLM,
    LizaConfig,
    LoraConfig,
    MemoryParam,
    ModelConfig,
)
from tptt_jax.decoder import is_memory
from tptt_jax.model import replace_memory
from tptt_jax.training.loss import causal_lm_loss


def titan(dropout=0.0):
    lora = LoraConfig(rank=2, targets=("q_proj",), dropout=dropout)
    liza = LizaConfig(softmax_window=4, chunk_size=4)
    return CausalLM(ModelConfig.tiny(), liza, lora, rngs=nnx.Rngs(0))


def flat_values(model):
    return {path: (x, np.asarray(x.get_value())) for path, x in nnx.to_flat_state(nnx.state(model))}


def test_every_parameter_has_one_of_three_types():
    kinds = (BaseParam, AdapterParam, MemoryParam)
    for path, (variable, _) in flat_values(titan()).items():
        assert [isinstance(variable, kind) for kind in kinds].count(True) == 1, path
        assert isinstance(variable, MemoryParam) is is_memory(path), path
        assert isinstance(variable, AdapterParam) is ("lora" in path and not is_memory(path)), path
        assert isinstance(variable, nnx.LoRAParam) is not isinstance(variable, BaseParam), path


@pytest.mark.parametrize(
    ("wrt", "moved"),
    [(nnx.LoRAParam, (AdapterParam, MemoryParam)), (MemoryParam, (MemoryParam,))],
    ids=["all that was added", "memory alone"],
)
def test_optimizer_trains_what_the_type_says(wrt, moved):
    model, tokens = titan(dropout=0.1), random_tokens((2, 12))
    model.train()
    before = flat_values(model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
    rngs = nnx.Rngs(dropout=0)

    def loss_of(model, rngs):
        total, count = causal_lm_loss(model, tokens, rngs=rngs)
        return total / count

    @nnx.jit
    def step(model, optimizer, rngs):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, rngs)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, rngs)) for _ in range(8)]
    assert losses[-1] < losses[0]
    for path, (variable, value) in flat_values(model).items():
        changed = not np.array_equal(value, before[path][1])
        # A mass gate's limit says what was seen, and is not trained.
        assert changed is (isinstance(variable, moved) and path[-1] != "limit"), path


def test_another_memory_keeps_the_mode():
    model = titan(dropout=0.5)
    for mode in (model.train, model.eval):
        mode()
        assert replace_memory(model, None).deterministic is model.deterministic
        assert replace_memory(model, model.liza).deterministic is model.deterministic


def test_train_and_eval_switch_dropout():
    model, tokens = titan(dropout=0.5), random_tokens((1, 12))
    state = nnx.state(model, AdapterParam)
    nnx.update(model, nnx.map_state(lambda _, x: x.replace(jnp.ones_like(x[...])), state))
    plain = logits_of(model, tokens)
    model.train()
    with pytest.raises(ValueError, match=r"give rngs=nnx.Rngs\(dropout=0\), or call model.eval"):
        model(tokens)

    run = nnx.jit(lambda model, rngs: model(tokens, rngs=rngs).logits)

    def logits(seed):
        return np.asarray(run(model, nnx.Rngs(dropout=seed)))

    one = logits(0)
    assert_array_equal(logits(0), one)
    assert np.abs(logits(1) - one).max() > 1e-3
    assert np.abs(plain - one).max() > 1e-3
    model.eval()
    assert_array_equal(logits_of(model, tokens), plain)
