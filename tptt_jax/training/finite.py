"""Rejects steps that would introduce NaN or infinity."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool

Tree = TypeVar("Tree")


def keep_finite(old: Tree, new: Tree, *measured: Array) -> tuple[Tree, Bool[Array, ""]]:
    """The result of a step, or the previous state if the result is not finite; for use under jit.

    Values that were not finite before may stay so: some optimizers start with infinity.

    Args:
      old: arrays before the step.
      new: the same after it, in a tree of the same structure.
      measured: metrics of the step, such as its loss and the norm of its gradient.

    Returns:
      `new` if `measured` and all previously finite values are finite, else `old`; and whether it
      is `new`.
    """

    def holds(before: Array, after: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(after), jnp.floating):
            return jnp.array(True)
        return jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))

    kept = jax.tree.leaves(jax.tree.map(holds, old, new))
    kept += [jnp.all(jnp.isfinite(x)) for x in measured]
    is_finite = jnp.stack(kept).all()
    return jax.tree.map(lambda a, b: jnp.where(is_finite, b, a), old, new), is_finite
