"""Residuals of a layer's backward pass: marks for values to save, and checkpoint policies."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from tptt_jax.array_typing import Array

_PRODUCT, _MIXED = "product", "mixed"
_is_marked = jax.checkpoint_policies.save_only_these_names(_PRODUCT, _MIXED)

# Policies of `jax.checkpoint`, which decide whether a primitive's result is saved.
saves_products = jax.checkpoint_policies.save_only_these_names(_PRODUCT)


def saves_marked(primitive: Any, *args: Any, **params: Any) -> bool:
    """Saves marked results and the outputs of cuDNN's attention; the rest is cheap to recompute."""
    return primitive.name.startswith("dot_product_attention") or _is_marked(
        primitive, *args, **params
    )


def save_product(x: Array) -> Array:
    """Marks a product with weights; without a policy this is x."""
    return checkpoint_name(x, _PRODUCT)


def save_mixed(x: Array) -> Array:
    """Marks outputs of attention or memory, or a random mask; without a policy this is x."""
    return checkpoint_name(x, _MIXED)


def scan_blocks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, blocks: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` whose gradient recomputes the steps, one at a time.

    The carry of every step is marked: otherwise the gradient of a layer would first rerun the
    whole scan for the carries. A single step starts with `carry`.

    Args:
      step: carry and one block to carry and output.
      carry: of the first step.
      blocks: arrays with a leading axis of blocks.

    Returns:
      The last carry; outputs with a leading axis of blocks.
    """
    run = jax.checkpoint(step)
    if jax.tree.leaves(blocks)[0].shape[0] == 1:
        return jax.lax.scan(run, carry, blocks)
    return jax.lax.scan(lambda c, x: run(jax.tree.map(save_mixed, c), x), carry, blocks)
