"""The memory's measures against what the model itself holds and mixes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax import CausalLM, LizaConfig, ModelConfig, init_cache
from tptt_jax.decoder import apply_norm
from tptt_jax.layers.memory import MemoryTokens
from tptt_jax.ops.delta_product.diagnostics import half_life, relative_norm
from tptt_jax.training.memory_health import measure_memory, memory_layers


def test_measures_are_those_of_the_state_that_decoding_holds():
    liza = LizaConfig(softmax_window=8, mag="learned", mag_init=0.3, full_layers=(1,))
    model = CausalLM(ModelConfig.tiny(), liza, rngs=nnx.Rngs(0))
    assert memory_layers(model) == (0, 2)
    tokens = jax.random.randint(jax.random.key(0), (1, 40), 1, 60)
    health = measure_memory(model, tokens, jnp.ones((1, 40), jnp.int32))
    np.testing.assert_allclose(health.share, 0.3, rtol=1e-5)
    cache = model(tokens, cache=init_cache(model, 1, 40)).cache
    assert cache is not None
    memory = cache.stacks[0].memory
    assert memory is not None
    assert memory.state.shape[0] == 2
    layer = model.stacks[0].unroll().layers[0]
    made = layer.self_attn.project(
        apply_norm(layer.attn_norm, model.embed(tokens, jnp.arange(40)[None]))
    )
    # The last 8 tokens are in the window.
    lost = MemoryTokens(made.soft_k[:, :32], made.soft_v[:, :32])
    written = layer.self_attn.memory.written(made.x[:, :32], lost)
    valid = jnp.arange(32)[None] >= liza.softmax_sinks  # sinks stay in sight
    expected = relative_norm(memory.state[0], written.values, valid)
    np.testing.assert_allclose(health.state_norm[0], expected, rtol=1e-4)
    np.testing.assert_allclose(health.half_life[0], half_life(written.log_decay, valid), rtol=1e-4)
    assert np.all(np.asarray(health.condition) > 1)
