"""Decoder layers: one layer, stacks of layers of one shape, and the decoding state.

Offered: layers and stacks, the state with its constructor and its check, and where a layer lies.
"""

from tptt_jax.decoder.layer import DecoderLayer, apply_norm
from tptt_jax.decoder.places import (
    is_memory,
    layer_location,
    layer_stacks,
    memory_location,
)
from tptt_jax.decoder.stack import REMAT_POLICIES, Stack, StackOutput
from tptt_jax.decoder.stack_cache import StackCache
from tptt_jax.decoder.state import (
    DecodingState,
    StateLayout,
    cache_capacity,
    init_decoding_state,
)
from tptt_jax.decoder.state_checks import check_decoding_state

__all__ = [
    "REMAT_POLICIES",
    "DecoderLayer",
    "DecodingState",
    "Stack",
    "StackCache",
    "StackOutput",
    "StateLayout",
    "apply_norm",
    "cache_capacity",
    "check_decoding_state",
    "init_decoding_state",
    "is_memory",
    "layer_location",
    "layer_stacks",
    "memory_location",
]
