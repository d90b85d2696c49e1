"""A stack of layers is a module: it can be called, scanned or with a module for each layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import assert_trees_close, randomize
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.layers.softmax_attention import token_context
from tptt_jax.ops.documents import count_positions

TINY = ModelConfig.tiny(num_layers=2, mlp_dim=16)
MIXED = dataclasses.replace(TINY, layer_kinds=("sliding", "full"), sliding_window=5)
CONFIGS = {
    "base": (TINY, None),
    "every token": (TINY, LizaConfig(writes="all", softmax_window=4, full_layers=(0,))),
    "evicted": (MIXED, LizaConfig(softmax_window=4)),
}


@pytest.mark.parametrize(("config", "liza"), CONFIGS.values(), ids=CONFIGS)
def test_unrolled_layers_give_hidden_states_branches_and_gradients_of_a_scan(config, liza):
    model = randomize(CausalLM(config, liza, LoraConfig(dropout=0.5), rngs=nnx.Rngs(0)))
    stack = model.stacks[0]
    x = jax.random.normal(jax.random.key(0), (2, 12, config.embed_dim))
    place = (count_positions((2, 12), None, None), None, None)
    contexts = {kind: token_context(config, liza, kind, *place) for kind in set(stack.kinds)}

    def results(stack, x):
        output = stack(x, contexts, return_branches=True, dropout_key=jax.random.key(1))
        return jnp.sum(output.hidden**2), output

    run = nnx.jit(lambda stack, x: jax.value_and_grad(results, 1, has_aux=True)(stack, x))
    unrolled = stack.unroll()
    assert stack.layers is None
    assert [layer.self_attn.memory is not None for layer in unrolled.layers] == list(
        stack.has_memory
    )
    want, got = run(stack, x), run(unrolled, x)
    assert np.isfinite(want[0][0])
    assert_trees_close(got, want, 1e-5, "outputs and gradients")
