"""Decoding on CPU: one module per layer instead of a scan over stacked ones."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from tptt_jax.model import CausalLM

# Below this, weights stay in the processor's own caches and copies of them are cheap.
_WORTHWHILE_BYTES = 1 << 25


def unstack_layers(model: CausalLM) -> CausalLM:
    """The same model with separate layers, sharing its arrays; for single tokens on CPU.

    A scan copies each layer's weights out of the stack before it multiplies by them. For a row of
    tokens that is negligible; for one token it triples the memory traffic, which limits decoding.
    On a CPU XLA can use a layer of a stack in place, so separate layers cost no memory.

    Args:
      model: any model; it is not changed.

    Returns:
      A model that computes the same, and takes longer to compile; or `model` itself where it
      is small or its arrays are not on one CPU.
    """
    leaves = jax.tree.leaves(nnx.state(model.stacks))
    if not all(_is_on_one_cpu(leaf) for leaf in leaves):
        return model
    if sum(leaf.nbytes for leaf in leaves) < _WORTHWHILE_BYTES:
        return model
    apart = nnx.merge(*nnx.split(model))
    apart.stacks = nnx.List(stack.unroll(_views) for stack in model.stacks)
    return apart


def _views(stacked: jax.Array) -> list[jax.Array]:
    """Every layer's array; it shares memory unless it is too small to be aligned."""
    device = next(iter(stacked.devices()))
    return [jax.device_put(part, device, may_alias=True) for part in np.asarray(stacked)]


def _is_on_one_cpu(leaf: Any) -> bool:
    devices = leaf.devices() if isinstance(leaf, jax.Array) else ()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
