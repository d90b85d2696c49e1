"""How the DeltaProduct operator does its work, by backend; see docs/performance.md."""

import importlib.util
import os
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float, SegmentIds
from tptt_jax.ops.delta_product_inputs import compute_dtype, is_default_precision
from tptt_jax.ops.gpu import compute_capability

# Virtual tokens of a kernel's chunk: rows of one matrix instruction of Hopper.
_KERNEL_WRITES = 64
# Architecture that the kernels were measured on.
_HOPPER = 9
# What the kernels have tiles for.
_MOST_CHANNELS, _MOST_STEPS, _LARGEST_GROUP = 128, 4, 16


class ChunkPlan(NamedTuple):
    """Measured, not derived.

    Attributes:
      chunk_size: tokens of a chunk.
      blocks: into which the chunks of a row are put; a block's chunks exist at the same time,
        and for the gradient a block is computed again.
      chunks: of a block.
    """

    chunk_size: int
    blocks: int
    chunks: int


class _Sizes(NamedTuple):
    """What a backend likes.

    Attributes:
      chunk_size: largest, in tokens; None: whatever the caller says.
      block: chunks of a block.
      whole: chunks of a row that are still one block.
    """

    chunk_size: int | None
    block: int
    whole: int


# On CPU a chunk's matrices must stay in the cache; elsewhere few large steps are best.
SIZES = {"cpu": _Sizes(chunk_size=16, block=8, whole=16)}
OTHERS = _Sizes(chunk_size=None, block=16, whole=16)


def plan_chunks(length: int, chunk_size: int, *, exact: bool = False) -> ChunkPlan:
    """How a row is cut.

    Args:
      length: tokens of the row.
      chunk_size: tokens of a chunk at most.
      exact: whether the result depends on the chunk size, so that it must be this one.

    Returns:
      Chunk size, blocks and chunks per block; together they hold at least the row.
    """
    sizes = SIZES.get(jax.default_backend(), OTHERS)
    size = min(chunk_size, max(length, 1))
    if sizes.chunk_size is not None and not exact:
        size = min(size, sizes.chunk_size)
    count = max(-(-length // size), 1)
    blocks = 1 if count <= sizes.whole else -(-count // sizes.block)
    return ChunkPlan(size, blocks, -(-count // blocks))


def choose_implementation(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None,
    segment_ids: SegmentIds | None,
    precision: jax.lax.PrecisionLike,
) -> Literal["xla", "pallas"]:
    """The Pallas kernels where they were measured to be faster than XLA's program.

    They are for bfloat16 inputs at the default precision on a Hopper GPU, five to eight times, and
    are tried first, see `kernels_agree`. TPTT_JAX_PALLAS=0 turns them off, 1 leaves out the trial.

    Args:
      q: queries.
      k: keys.
      v: values.
      beta: write gate.
      log_decay: forget gate, or None.
      segment_ids: document ids, or None.
      precision: of products.
    """
    asked = os.environ.get("TPTT_JAX_PALLAS")
    if asked == "0" or not is_default_precision(precision):
        return "xla"
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)) or not _fits_kernels(q, k, v, beta):
        return "xla"
    capability = compute_capability()
    if capability is None or capability[0] != _HOPPER or not _has_compiler():
        return "xla"
    if asked == "1":
        return "pallas"
    from tptt_jax.ops.kernel_trial import KernelKind, kernels_agree  # imports the operator

    kind = KernelKind(
        dim=q.shape[3],
        value_dim=v.shape[-1],
        steps=k.shape[2],
        group=q.shape[2] // k.shape[3],
        per_channel=beta.ndim == 5,
        decay=log_decay is not None,
        documents=segment_ids is not None,
    )
    return "pallas" if kernels_agree(kind) else "xla"


def check_kernels(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    state_activation: str,
) -> None:
    """Raises ValueError if the Pallas kernels do not do what is asked.

    Args:
      q: queries.
      k: keys.
      v: values.
      beta: write gate.
      state_activation: must be "none".
    """
    if jax.default_backend() == "gpu" and not _has_compiler():
        raise ValueError(
            f"jax {jax.__version__} has no Triton backend for Pallas, which the kernels need: "
            f'use implementation="xla".'
        )
    if state_activation != "none" or not _fits_kernels(q, k, v, beta):
        raise ValueError(
            f"the kernels do not take q {q.dtype}{list(q.shape)}, v {v.dtype}{list(v.shape)} with "
            f'state_activation={state_activation!r}: use implementation="xla".'
        )


def _has_compiler() -> bool:
    """Whether this JAX compiles Pallas kernels with Triton; later releases are to drop it."""
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


def kernel_chunk_size(steps: int) -> int:
    """Tokens of a chunk of the kernels; a token has as many virtual ones as a power of 2.

    Args:
      steps: Householder steps N of a token.
    """
    return _KERNEL_WRITES // power_of_2(steps)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not smaller."""
    return 1 << (size - 1).bit_length()
