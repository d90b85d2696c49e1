"""The place of a layer: which stack holds its parameters, at which index."""

import itertools
from typing import Any

from tptt_jax.config import LizaConfig, ModelConfig, memory_layers


def layer_stacks(config: ModelConfig) -> tuple[range, ...]:
    """Runs of consecutive layers of one shape; each is stacked, scanned and compiled once.

    Layers of different kinds (sliding, full, kept) have the same parameters and share a stack.
    """
    runs = itertools.groupby(range(config.num_layers), key=config.layer_sizes)
    layers = [list(run) for _, run in runs]
    return tuple(range(run[0], run[-1] + 1) for run in layers)


def layer_location(config: ModelConfig, layer: int) -> tuple[int, int]:
    """The place of a layer's parameters: number of the stack, index on its leading axis."""
    for number, layers in enumerate(layer_stacks(config)):
        if layer in layers:
            return number, layers.index(layer)
    raise ValueError(f"the model has {config.num_layers} layers, counted from 0, got {layer}.")


def memory_location(
    config: ModelConfig, liza: LizaConfig | None, layer: int
) -> tuple[int, int] | None:
    """The place of a layer's memory parameters, as `layer_location`; None without a memory.

    Their leading axis counts only the layers of the stack that have a memory.
    """
    number, _ = layer_location(config, layer)
    with_memory = set(memory_layers(config, liza))
    mine = [other for other in layer_stacks(config)[number] if other in with_memory]
    return (number, mine.index(layer)) if layer in mine else None


def is_memory(path: tuple[Any, ...]) -> bool:
    """Whether a path leads to a parameter of the memory; with a variable see `MemoryParam`."""
    return "memory" in path or "mag" in path
