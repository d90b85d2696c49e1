"""Bytes and operations of context parallelism, counted from a configuration.

Counted for one device and one row in a step of LoRA training. The exchanges are those that
`tptt_jax.ops.context` writes down; XLA adds those of `data`, `fsdp` and `tensor`.
"""

import math
from typing import NamedTuple

from experiments.benchmarks.flops import (
    attention_flops,
    operator_flops,
    running_layers,
    training_flops,
)
from tptt_jax import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import layer_kinds
from tptt_jax.layers.cache import num_sinks, softmax_window

_STATE_BYTES = 4
# Forward, recomputed in the backward pass, and the gradients on their way back.
_PASSES = 3


class Exchange(NamedTuple):
    """What one device receives in a forward pass.

    Attributes:
      state: bytes of transitions of the memory.
      window: bytes of keys and values before the shard, for the window and for eviction.
      sinks: bytes of sinks.
      whole: bytes of keys and values of whole rows, in layers without a window.
      rounds: exchanges that wait for one another.
    """

    state: float = 0.0
    window: float = 0.0
    sinks: float = 0.0
    whole: float = 0.0
    rounds: int = 0

    @property
    def bytes(self) -> float:
        """All of them."""
        return self.state + self.window + self.sinks + self.whole


class StepCost(NamedTuple):
    """One step of training on one device.

    Attributes:
      flops: operations of matrix products.
      exchange: of all layers, in all passes.
    """

    flops: float
    exchange: Exchange

    def seconds(self, *, flops: float, bandwidth: float, latency: float) -> float:
        """Time without any overlap of arithmetic and exchange.

        Args:
          flops: operations per second that matrix products reach.
          bandwidth: bytes per second that a device receives.
          latency: seconds of an exchange, whatever its size.
        """
        waiting = self.exchange.bytes / bandwidth + self.exchange.rounds * latency
        return self.flops / flops + waiting


def scan_rounds(shards: int) -> int:
    """Exchanges of transitions before the last one, which brings the state: ceil(log2(n - 1))."""
    return math.ceil(math.log2(shards - 1)) if shards > 2 else 0


def layer_exchange(
    config: ModelConfig,
    liza: LizaConfig | None,
    layer: int,
    *,
    tokens: int,
    shards: int,
    width: int,
) -> Exchange:
    """What one device receives for one layer in a forward pass.

    Args:
      config: of the model.
      liza: its memory.
      layer: counted from 0.
      tokens: of a shard, of one row.
      shards: devices of the context axis.
      width: bytes of an activation.
    """
    if shards == 1:
        return Exchange()
    window = softmax_window(config, liza, layer_kinds(config, liza)[layer])
    _, kv_heads, _ = config.layer_sizes(layer)
    token = 2.0 * kv_heads * config.head_dim * width
    is_whole = window is None or window >= tokens * shards
    found, evicts = Exchange(), liza is not None and liza.writes == "evicted"
    has_memory = liza is not None and layer in running_layers(config, liza)
    if has_memory and not (evicts and is_whole):
        rounds = scan_rounds(shards)
        state = kv_heads * config.head_dim**2 * _STATE_BYTES
        found = Exchange(state=(2 * rounds + 1) * state, rounds=rounds + 1)
    if liza is not None and not liza.softmax:
        return found
    if window is None or is_whole:
        others = tokens * (shards - 1)
        return found._replace(whole=others * token, rounds=found.rounds + 1)
    reach, times = min(window, tokens * (shards - 1)), 2 if has_memory and evicts else 1
    sinks = num_sinks(config, liza, layer_kinds(config, liza)[layer])
    return found._replace(
        window=times * reach * token,
        sinks=(shards - 1) * sinks * token,
        rounds=found.rounds + times * math.ceil(reach / tokens) + (1 if sinks else 0),
    )


def step_cost(
    config: ModelConfig,
    liza: LizaConfig | None,
    *,
    tokens: int,
    shards: int,
    width: int,
) -> StepCost:
    """One step of LoRA training (rank 8) on one row of `tokens` tokens per device."""
    layers = range(config.num_layers)
    parts = [
        layer_exchange(config, liza, i, tokens=tokens, shards=shards, width=width) for i in layers
    ]
    sums = [_PASSES * sum(column) for column in zip(*parts, strict=True)]
    exchange = Exchange(*sums[:-1], rounds=int(sums[-1]))
    flops = training_flops(config, liza, LoraConfig(), batch=1, tokens=tokens)
    if shards > 1:
        flops += 3 * _extra_flops(config, liza, tokens, shards)
    return StepCost(flops, exchange)


def _extra_flops(config: ModelConfig, liza: LizaConfig | None, tokens: int, shards: int) -> float:
    """What a shard computes in a forward pass beyond a row of its own."""
    before = tokens * (shards - 1)
    extra = attention_flops(config, liza, tokens, first=before)
    extra -= attention_flops(config, liza, tokens)
    for layer, kind in enumerate(layer_kinds(config, liza)):
        heads, kv_heads, _ = config.layer_sizes(layer)
        softmax = liza is None or liza.softmax
        if softmax and softmax_window(config, liza, kind) is None:
            # Every device multiplies its queries with all keys, later ones too.
            masked = tokens**2 - tokens * (tokens + 1) / 2
            extra += 4.0 * heads * config.head_dim * masked
        if liza is not None and layer in running_layers(config, liza):
            extra += _memory_extra(config, liza, heads, kv_heads, tokens, shards)
    return extra


def _memory_extra(
    config: ModelConfig, liza: LizaConfig, heads: int, kv_heads: int, tokens: int, shards: int
) -> float:
    """The run without values, reading the incoming state, and the products of transitions."""
    dim = config.head_dim
    sizes = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    options = {"householder": liza.recurrence.num_householder, "chunk_size": liza.chunk_size}
    both = operator_flops(**sizes, **options, value_dim=2 * dim)
    reading = 2.0 * tokens * heads * dim**2
    return (
        both
        - operator_flops(**sizes, **options)
        + reading
        + 4.0 * scan_rounds(shards) * kv_heads * dim**3
    )
