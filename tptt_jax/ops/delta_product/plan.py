"""Chunk and block sizes of the DeltaProduct operator, by device; see docs/performance.md."""

from typing import NamedTuple

from tptt_jax.ops.devices import platform_of

# Virtual tokens of a kernel's chunk: rows of one matrix instruction of Hopper.
_KERNEL_WRITES = 64


class ChunkPlan(NamedTuple):
    """Chunks and blocks of a row; their sizes are measured, not derived.

    Attributes:
      chunk_size: tokens of a chunk.
      blocks: number of blocks of chunks; a block's chunks are computed together, and its gradient
        recomputes it.
      chunks: of a block.
    """

    chunk_size: int
    blocks: int
    chunks: int


class _Sizes(NamedTuple):
    """Fastest block sizes on a kind of device.

    Attributes:
      chunk_size: largest, in tokens; None: the caller's.
      block: chunks of a block.
      whole: chunks of a row that are still one block.
    """

    chunk_size: int | None
    block: int
    whole: int


# On CPU a chunk's matrices must stay in the cache; elsewhere few large steps are best.
SIZES = {"cpu": _Sizes(chunk_size=16, block=8, whole=16)}
OTHERS = _Sizes(chunk_size=None, block=16, whole=16)


def plan_chunks(
    length: int, chunk_size: int, *, exact: bool = False, platform: str | None = None
) -> ChunkPlan:
    """Plans the chunks and blocks of a row.

    Args:
      length: tokens of the row.
      chunk_size: most tokens of a chunk.
      exact: whether exactly this chunk size is needed, because the result depends on it.
      platform: that the program runs on, such as "cpu"; None: the default device's.

    Returns:
      Chunk size, blocks and chunks per block; together they hold at least the row.
    """
    sizes = SIZES.get(platform_of() if platform is None else platform, OTHERS)
    size = min(chunk_size, max(length, 1))
    if sizes.chunk_size is not None and not exact:
        size = min(size, sizes.chunk_size)
    count = max(-(-length // size), 1)
    if count <= sizes.whole:
        return ChunkPlan(size, 1, count)
    # Of blocks that are not much larger, those that fill the row best.
    plans = [
        ChunkPlan(size, -(-count // chunks), chunks)
        for chunks in range(sizes.block, sizes.block + sizes.block // 2 + 1)
    ]
    return min(plans, key=lambda plan: (plan.blocks * plan.chunks, plan.chunks))


def kernel_chunk_size(steps: int) -> int:
    """Tokens of a chunk of the kernels; a token has as many virtual ones as a power of 2.

    Args:
      steps: Householder steps N of a token.
    """
    return _KERNEL_WRITES // power_of_2(steps)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`."""
    return 1 << (size - 1).bit_length()
