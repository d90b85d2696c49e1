"""What the gradient of a layer keeps of the forward pass: marks, and policies that heed them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from tptt_jax.array_typing import Array

_PRODUCT, _MIXED = "product", "mixed"
_is_marked = jax.checkpoint_policies.save_only_these_names(_PRODUCT, _MIXED)

# Policies of `jax.checkpoint`, which ask whether a primitive's result is kept.
saves_products = jax.checkpoint_policies.save_only_these_names(_PRODUCT)


def saves_marked(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keeps what is marked, and what cuDNN's attention returns; all else is cheap to make again."""
    return primitive.name.startswith("dot_product_attention") or _is_marked(
        primitive, *args, **params
    )


def save_product(x: Array) -> Array:
    """Marks a product with weights; without a policy this is x."""
    return checkpoint_name(x, _PRODUCT)


def save_mixed(x: Array) -> Array:
    """Marks what attention or the memory made of the tokens; without a policy this is x."""
    return checkpoint_name(x, _MIXED)


def saving_carry(step: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what a step of a scan begins with, so that steps are made again one at a time.

    Without, the gradient would first run the whole scan again for what lies between its steps.
    """
    return lambda carry, x: step(jax.tree.map(save_mixed, carry), x)
