"""Chooses the implementation of the DeltaProduct operator."""

import importlib.util
import os
import warnings
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tptt_jax.array_typing import Array, Float, SegmentIds
from tptt_jax.ops.delta_product.inputs import compute_dtype, is_default_precision
from tptt_jax.ops.delta_product.kernel_kind import KernelKind
from tptt_jax.ops.devices import compute_capability, platform_of
from tptt_jax.ops.manual_axes import varying_axes

# Architecture that the kernels were measured on.
_HOPPER = 9
# Largest sizes that the kernels support.
_MOST_CHANNELS, _MOST_STEPS, _LARGEST_GROUP = 128, 4, 16


# Kinds of kernels that a warm-up has found in a function; None: no warm-up is looking for them.
wanted_kernels: ContextVar[set[KernelKind] | None] = ContextVar("wanted_kernels", default=None)


def choose_implementation(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None,
    segment_ids: SegmentIds | None,
    precision: jax.lax.PrecisionLike,
) -> Literal["xla", "pallas"]:
    """Chooses the Pallas kernels where they were measured to be faster than XLA's program.

    That is for bfloat16 inputs at the default precision on a Hopper GPU, where they are five to
    eight times as fast, and once a trial has found them right, see `warm_up_kernels`. While a
    function is traced no trial is run: without a warm-up XLA's program is chosen. Outside of a
    trace the first call is the trial. TPTT_JAX_PALLAS=0 disables the kernels, 1 skips the trial.

    Args:
      q: queries.
      k: keys.
      v: values.
      beta: write gate.
      log_decay: forget gate, or None.
      segment_ids: document ids, or None.
      precision: of products.

    Raises:
      RuntimeError: if the kernels fail in one of several processes, which all need to choose alike.
    """
    setting = os.environ.get("TPTT_JAX_PALLAS")
    if setting == "0" or not is_default_precision(precision):
        return "xla"
    if varying_axes(q):
        # Kernels do not declare along which mesh axes their results vary.
        return "xla"
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)) or not _fits_kernels(q, k, v, beta):
        return "xla"
    capability = compute_capability(q, k, v)
    if capability is None or capability[0] != _HOPPER or not _has_compiler():
        return "xla"
    if setting == "1":
        return "pallas"
    kind = KernelKind(
        dim=q.shape[3],
        value_dim=v.shape[-1],
        steps=k.shape[2],
        group=q.shape[2] // k.shape[3],
        gate=str(beta.dtype),
        per_channel=beta.ndim == 5,
        decay=log_decay is not None,
        documents=segment_ids is not None,
    )
    return "pallas" if _kernels_verified(kind, is_traced=_is_traced(q, k, v, beta)) else "xla"


def _kernels_verified(kind: KernelKind, *, is_traced: bool) -> bool:
    """Whether kernels were tried and agree; a trial runs outside of traces only."""
    wanted = wanted_kernels.get()
    if wanted is not None:
        wanted.add(kind)
        return False
    # Imported lazily: only GPUs need Pallas.
    from tptt_jax.ops.delta_product.trial import earlier_verdict, kernels_agree

    verdict = earlier_verdict(kind)
    if verdict is None and not is_traced:
        return kernels_agree(kind)
    if verdict is None:
        warnings.warn(
            "the Pallas kernels for DeltaProduct were not tried before this function was traced: "
            "XLA's program is used, which computes the same in more time. Call "
            f"tptt_jax.warm_up(model) first, or set TPTT_JAX_PALLAS=0 ({kind}).",
            stacklevel=2,
        )
    return bool(verdict)


def _is_traced(*arrays: Any) -> bool:
    return any(isinstance(x, Tracer) for x in arrays)


def may_try_kernels() -> bool:
    """Whether a trial could matter: the default device runs the kernels, and nobody has chosen."""
    capability = compute_capability()
    is_hopper = capability is not None and capability[0] == _HOPPER
    return is_hopper and _has_compiler() and os.environ.get("TPTT_JAX_PALLAS") not in ("0", "1")


def check_kernels(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    state_activation: str,
) -> None:
    """Raises ValueError if the Pallas kernels do not support these arguments.

    Args:
      q: queries.
      k: keys.
      v: values.
      beta: write gate.
      state_activation: must be "none".
    """
    if platform_of(q, k, v) == "gpu" and not _has_compiler():
        raise ValueError(
            f"jax {jax.__version__} has no Triton backend for Pallas, which the kernels need: "
            f'use implementation="xla".'
        )
    if varying_axes(q):
        raise ValueError(
            "the kernels do not work under jax.shard_map with check_vma=True: use "
            'check_vma=False or implementation="xla".'
        )
    if state_activation != "none" or not _fits_kernels(q, k, v, beta):
        raise ValueError(
            f"the kernels do not take q {q.dtype}{list(q.shape)}, v {v.dtype}{list(v.shape)} with "
            f'state_activation={state_activation!r}: use implementation="xla".'
        )


def _has_compiler() -> bool:
    """Whether this JAX compiles Pallas kernels with Triton; later releases will drop it."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _fits_kernels(q: Array, k: Array, v: Array, beta: Array) -> bool:
    _, length, heads, dim = q.shape
    steps, kv_heads, value_dim = v.shape[2:]
    return (
        length > 0
        and steps <= _MOST_STEPS
        and heads // kv_heads <= _LARGEST_GROUP
        and max(dim, value_dim) <= _MOST_CHANNELS
        and compute_dtype(q, k, v, beta) == jnp.float32
    )
