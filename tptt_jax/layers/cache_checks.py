"""Checks that a cache or state fits a model: the ring must have the slots of the layer's window."""

from typing import Any

from tptt_jax.config import LayerKind, LizaConfig, ModelConfig
from tptt_jax.layers.cache import KeyValueCache, num_sinks, softmax_window


def check_equal(name: str, found: Any, expected: Any) -> None:
    """Raises ValueError if a property of a state differs from the model's."""
    if found != expected:
        raise ValueError(
            f"{name}: {found} in the state, {expected} in the model: read the document again."
        )


def check_setting(name: str, found: int | None, expected: int | None) -> None:
    """Raises ValueError if a setting of the model is not that of the state's reading."""
    if found != expected:
        before, now = ("none" if x is None else x for x in (found, expected))
        raise ValueError(
            f"{name}: {before} in the state, {now} in the model; use the {name} of its reading, "
            "or read the document again."
        )


def check_ring(
    config: ModelConfig, liza: LizaConfig | None, kind: LayerKind, cache: KeyValueCache
) -> None:
    """Raises ValueError unless a cache fits the window and the sinks of its layers.

    A token's slot is its position modulo the slots, so a ring of another window would be misread.

    Args:
      config: sizes of the layers.
      liza: None for the plain base model.
      kind: of the layers.
      cache: of the layers; its arrays have a leading axis of layers.
    """
    if any(x.ndim != 5 for x in cache):
        shapes = [list(x.shape) for x in cache]
        raise ValueError(
            "the arrays of a cache must have 5 axes ([layers, B, S, K, D]), got shapes "
            f"{shapes}: read the document again."
        )
    slots, value_slots, sinks, value_sinks = (x.shape[2] for x in cache)
    for what, keys, values in (("slots", slots, value_slots), ("sinks", sinks, value_sinks)):
        if keys != values:
            raise ValueError(
                f"the state has {keys} {what} for keys but {values} for values: read the document "
                "again."
            )
    window, expected_sinks = softmax_window(config, liza, kind), num_sinks(config, liza, kind)
    # Only a window that a memory adds keeps sinks.
    if window is not None or sinks:
        check_setting("window", slots, window)
    check_setting("softmax_sinks", sinks, expected_sinks)
