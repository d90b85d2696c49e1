"""Decoder layers: one layer, stacks of layers of one shape, and the caches of a stack."""

from tptt_jax.decoder.layer import DecoderLayer, apply_norm
from tptt_jax.decoder.places import (
    is_memory,
    layer_location,
    layer_stacks,
    memory_location,
)
from tptt_jax.decoder.stack import REMAT_POLICIES, Stack, StackOutput
from tptt_jax.decoder.stack_cache import Cache, StackCache, check_cache, init_stack_caches

__all__ = [
    "REMAT_POLICIES",
    "Cache",
    "DecoderLayer",
    "Stack",
    "StackCache",
    "StackOutput",
    "apply_norm",
    "check_cache",
    "init_stack_caches",
    "is_memory",
    "layer_location",
    "layer_stacks",
    "memory_location",
]
