"""Logits of the LM head, whose weights may be quantised."""

import jax.numpy as jnp
from jax import lax

from tptt_jax.array_typing import Array
from tptt_jax.ops.attention.softcap import apply_softcap
from tptt_jax.ops.quantization import QuantizedArray, Weight, dense, slice_weight

# Values of a quantised head that are dense at a time: 64 MiB in bfloat16.
DENSE_AT_A_TIME = 1 << 25


def head_logits(hidden: Array, head: Array, softcap: float | None) -> Array:
    """[..., E] and [V, E] -> float32 [..., V]."""
    return apply_softcap(head_product(hidden, head, 0).astype(jnp.float32), softcap)


def dense_rows(head: Weight, vocab_axis: int) -> int:
    """Entries of a head that are dense at a time: all, unless it is quantised."""
    entries, width = head.shape[vocab_axis], head.shape[1 - vocab_axis]
    is_quantized = isinstance(head, QuantizedArray)
    return min(entries, max(1, DENSE_AT_A_TIME // width)) if is_quantized else entries


def head_product(hidden: Array, head: Weight, vocab_axis: int) -> Array:
    """Hidden states times the head [..., V], in at least float32.

    In half precision logits are rounded by so much that probabilities of a token exceed 1.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    if isinstance(head, QuantizedArray):
        return _block_products(hidden, head, vocab_axis)
    form = "...e,ve->...v" if vocab_axis == 0 else "...e,ev->...v"
    return jnp.einsum(form, hidden, head.astype(hidden.dtype), preferred_element_type=wide)


def _block_products(hidden: Array, head: QuantizedArray, vocab_axis: int) -> Array:
    """`head_product` with a few entries of a quantised head at a time."""
    vocab, block = head.shape[vocab_axis], dense_rows(head, vocab_axis)

    def products(first: Array | int) -> Array:
        piece = slice_weight(head, first, block, vocab_axis)
        return head_product(hidden, dense(piece, hidden.dtype), vocab_axis)

    if block == vocab:
        return products(0)

    def visit(number: Array, logits: Array) -> Array:
        # The last block overlaps the one before.
        first = jnp.minimum(number * block, vocab - block)
        return lax.dynamic_update_slice_in_dim(logits, products(first), first, axis=-1)

    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.zeros((*hidden.shape[:-1], vocab), dtype)
    return lax.fori_loop(0, -(-vocab // block), visit, logits)
