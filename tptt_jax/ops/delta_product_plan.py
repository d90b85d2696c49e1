"""How the DeltaProduct operator does its work, by backend; see docs/performance.md."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Float
from tptt_jax.ops.delta_product_inputs import compute_dtype, is_default_precision

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


def can_run_kernels(
    q: Float[Array, "B T H D"], k: Float[Array, "B T N K D"], v: Float[Array, "B T N K Dv"]
) -> bool:
    """Whether the Pallas kernels do what is asked, on any machine.

    Args:
      q: queries.
      k: keys.
      v: values.
    """
    _, length, heads, dim = q.shape
    steps, kv_heads, value_dim = v.shape[2:]
    return (
        length > 0
        and steps <= _MOST_STEPS
        and heads // kv_heads <= _LARGEST_GROUP
        and max(dim, value_dim) <= _MOST_CHANNELS
        and compute_dtype(q, k, v) == jnp.float32
    )


def prefers_kernels(precision: jax.lax.PrecisionLike, *arrays: Array) -> bool:
    """Whether the Pallas kernels were measured to be faster than XLA's program here.

    They are for bfloat16 inputs at the default precision on a Hopper GPU, five to eight times.
    TPTT_JAX_PALLAS=0 turns them off.

    Args:
      precision: of products.
      *arrays: inputs of the operator that are multiplied.
    """
    if jax.default_backend() != "gpu" or os.environ.get("TPTT_JAX_PALLAS") == "0":
        return False
    if any(x.dtype != jnp.bfloat16 for x in arrays) or not is_default_precision(precision):
        return False
    # Such as 9.0; AMD's have names such as gfx90a.
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if re.fullmatch(r"9\.\d+", capability) is None:
        return False
    # Later releases of JAX are to drop it.
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None
