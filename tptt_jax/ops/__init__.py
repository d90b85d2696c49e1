"""Pure functions on arrays.

Offered: the DeltaProduct operator in its forms, gates, virtual tokens, and the warm-up of kernels.
"""

from tptt_jax.ops.delta_product import chunk_delta_product, naive_delta_product, step_delta_product
from tptt_jax.ops.delta_product.inputs import activate_state
from tptt_jax.ops.delta_product.triangular import invert_unit_lower, solve_unit_lower
from tptt_jax.ops.delta_product.warm_up import warm_up_kernels
from tptt_jax.ops.documents import document_ordinals
from tptt_jax.ops.gates import causal_mean, compute_beta, compute_gate, compute_log_decay
from tptt_jax.ops.token_shift import shift_tokens
from tptt_jax.ops.virtual_tokens import expand_virtual_tokens

__all__ = [
    "activate_state",
    "causal_mean",
    "chunk_delta_product",
    "compute_beta",
    "compute_gate",
    "compute_log_decay",
    "document_ordinals",
    "expand_virtual_tokens",
    "invert_unit_lower",
    "naive_delta_product",
    "shift_tokens",
    "solve_unit_lower",
    "step_delta_product",
    "warm_up_kernels",
]
