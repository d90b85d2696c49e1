"""The DeltaProduct recurrence: parallel over chunks, one step, and token by token as the oracle.

Behind them: input checks, block sizes, and Pallas kernels with their trial.
"""

from tptt_jax.ops.delta_product.chunked import chunk_delta_product
from tptt_jax.ops.delta_product.naive import naive_delta_product
from tptt_jax.ops.delta_product.split import split_delta_product
from tptt_jax.ops.delta_product.step import step_delta_product

__all__ = [
    "chunk_delta_product",
    "naive_delta_product",
    "split_delta_product",
    "step_delta_product",
]
