"""Steps that would bring in NaN or infinity are not taken."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool

Tree = TypeVar("Tree")


def keep_finite(old: Tree, new: Tree, *measured: Array) -> tuple[Tree, Bool[Array, ""]]:
    """What a step has made, or what was there before if that is not finite; for use under jit.

    Values that were not finite before may stay so: some optimizers begin with infinity.

    Args:
      old: arrays before the step.
      new: the same after it, in a tree of the same structure.
      measured: of the step, such as its loss and the norm of its gradient.

    Returns:
      `new` if `measured` and all values that were finite before are finite, else `old`; and
      which of both it is.
    """

    def holds(before: Array, after: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(after), jnp.floating):
            return jnp.array(True)
        return jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))

    kept = jax.tree.leaves(jax.tree.map(holds, old, new))
    kept += [jnp.all(jnp.isfinite(x)) for x in measured]
    is_finite = jnp.stack(kept).all()
    return jax.tree.map(lambda a, b: jnp.where(is_finite, b, a), old, new), is_finite
