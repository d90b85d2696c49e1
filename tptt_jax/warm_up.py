"""Tries the GPU kernels of a model before its functions are traced."""

import jax
import jax.numpy as jnp
from flax import nnx

from tptt_jax.array_typing import Array
from tptt_jax.decoder import DecodingState
from tptt_jax.model import CausalLM, init_cache
from tptt_jax.ops.delta_product.choice import may_try_kernels
from tptt_jax.ops.delta_product.kernel_kind import KernelKind
from tptt_jax.ops.delta_product.warm_up import warm_up_kernels


def warm_up(model: CausalLM) -> dict[KernelKind, bool]:
    """Tries the GPU kernels that a model uses for training and reading.

    Call it once, before anything of the model is compiled; our commands do. Without it XLA's
    program runs the memory, which computes the same. Only on Hopper GPUs, for a model in bfloat16,
    it does anything: it compares the kernels with the recurrence, which takes some seconds.

    Args:
      model: a base model or a Titan; not called, only traced.

    Returns:
      Whether the kernels of each kind agree; kinds that do not are warned of, and not used.

    Raises:
      RuntimeError: if kernels fail in one of several processes, which all need to choose alike.
    """
    if model.liza is None or not may_try_kernels():
        return {}
    graphdef, weights = nnx.split(model)
    # A memory of evicted tokens idles in rows that fit the window.
    windows = (model.liza.softmax_window, model.config.sliding_window)
    tokens = jax.ShapeDtypeStruct((1, max(w or 0 for w in windows) + 2), jnp.int32)
    state = jax.eval_shape(lambda: init_cache(model, 1, growable=True))

    def run(weights: nnx.State, tokens: Array, ids: Array, state: DecodingState) -> None:
        traced = nnx.merge(graphdef, weights)
        for some_ids in (None, ids):
            for cache in (None, state):
                traced.forward_hidden(tokens, some_ids, cache=cache)

    return warm_up_kernels(run, weights, tokens, tokens, state)
