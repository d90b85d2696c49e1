"""Steps that would leave NaN or infinity behind are not taken."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool

Tree = TypeVar("Tree")


def keep_finite(old: Tree, new: Tree, *measured: Array) -> tuple[Tree, Bool[Array, ""]]:
    """What a step has made, or what was there before if that is not finite; for use under jit.

    Args:
      old: arrays before the step.
      new: the same after it.
      measured: of the step, such as its loss and the norm of its gradient.

    Returns:
      `new` where it and `measured` are finite throughout, else `old`; and whether they are.
    """
    leaves: list[Any] = [*jax.tree.leaves(new), *measured]
    floats = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    is_finite = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
    return jax.tree.map(lambda a, b: jnp.where(is_finite, b, a), old, new), is_finite
