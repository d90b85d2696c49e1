"""Whether a cache is one that a layer made: its ring must have the slots of the layer's window."""

from tptt_jax.config import LayerKind, LizaConfig, ModelConfig
from tptt_jax.layers.cache import KeyValueCache, num_sinks, softmax_window

ANOTHER_SHAPE = "the state comes from a model of another shape: read the document again."


def check_ring(
    config: ModelConfig, liza: LizaConfig | None, kind: LayerKind, cache: KeyValueCache
) -> None:
    """Raises ValueError unless a cache fits the window and the sinks of its layers.

    A token's slot is its position modulo the slots, so a ring of another window would be misread.

    Args:
      config: sizes of the layers.
      liza: None for the plain base model.
      kind: of the layers.
      cache: theirs; its arrays have a leading axis of layers.
    """
    if any(x.ndim != 5 for x in cache):
        raise ValueError(ANOTHER_SHAPE)
    slots, value_slots = cache.keys.shape[2], cache.values.shape[2]
    sinks = {x.shape[2] for x in (cache.sink_keys, cache.sink_values)}
    if slots != value_slots or len(sinks) != 1:
        raise ValueError(
            f"the state has {slots} slots for keys but {value_slots} for values: read the document "
            "again."
        )
    window, wanted_sinks = softmax_window(config, liza, kind), num_sinks(config, liza, kind)
    # Only a window that a memory adds keeps sinks.
    if slots != window if window is not None else sinks != {0}:
        raise ValueError(
            f"window: {slots} in the state, {window or 'none'} in the model; take the window that "
            "it was read with, or read the document again."
        )
    if sinks != {wanted_sinks}:
        raise ValueError(
            f"softmax_sinks: {min(sinks)} in the state, {wanted_sinks} in the model; take what it "
            "was read with, or read the document again."
        )
