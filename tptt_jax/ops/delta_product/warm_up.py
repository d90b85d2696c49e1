"""The warm-up: tries GPU kernels before functions that would use them are traced."""

from collections.abc import Callable
from typing import Any

import jax

from tptt_jax.ops.delta_product.choice import may_try_kernels, wanted_kernels
from tptt_jax.ops.delta_product.kernel_kind import KernelKind


def warm_up_kernels(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[KernelKind, bool]:
    """Tries all kinds of kernels that a function could use; `tptt_jax.warm_up` does it for a model.

    The function is traced abstractly, so nothing of it is computed. Then the kernels of each kind
    are compared with the recurrence, see `kernels_agree`: seconds for each kind, once in a process.
    Functions that are traced later use the kernels that agree.

    Args:
      function: calls `chunk_delta_product` somewhere, but not in a function of `jax.jit`, of which
        JAX would keep this trace, with XLA's program.
      args: its arguments, arrays or `jax.ShapeDtypeStruct`.
      kwargs: likewise.

    Returns:
      Whether the kernels of each kind agree. Empty where no kernels would be used: on CPUs, TPUs
      and other GPUs than Hopper, or if TPTT_JAX_PALLAS chooses.

    Raises:
      RuntimeError: if kernels fail in one of several processes, which all need to choose alike.
    """
    if not may_try_kernels():
        return {}
    wanted: set[KernelKind] = set()
    token = wanted_kernels.set(wanted)
    try:
        # A function of its own, as JAX keeps what it has traced by its identity.
        jax.eval_shape(lambda *args, **kwargs: function(*args, **kwargs), *args, **kwargs)
    finally:
        wanted_kernels.reset(token)
    # Imported lazily: only GPUs need Pallas.
    from tptt_jax.ops.delta_product.trial import kernels_agree

    return {kind: kernels_agree(kind) for kind in sorted(wanted)}
