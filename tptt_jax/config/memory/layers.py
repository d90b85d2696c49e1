"""Which layers of a Titan have a window and a memory."""

from tptt_jax.config.memory.liza import LizaConfig
from tptt_jax.config.model import LayerKind, ModelConfig


def layer_kinds(config: ModelConfig, liza: LizaConfig | None) -> tuple[LayerKind, ...]:
    """The kind of each layer of a Titan, in order: the base model's, and "kept" ones.

    Raises:
      ValueError: if `liza.full_layers` names a layer that the model lacks or windows itself, or
        leaves no layer to give a window and a memory.
    """
    if liza is None or not liza.full_layers:
        return config.layer_kinds
    kinds: list[LayerKind] = list(config.layer_kinds)
    for layer in liza.full_layers:
        if layer >= config.num_layers:
            raise ValueError(
                f"full_layers names layer {layer}, but the model has {config.num_layers} layers, "
                "counted from 0."
            )
        if kinds[layer] == "sliding":
            raise ValueError(
                f"full_layers names layer {layer}, which the base model windows itself, so it has "
                f"no full attention to keep; layers that have: {_listed(config, 'full')}."
            )
        kinds[layer] = "kept"
    if "full" not in kinds:
        raise ValueError(
            f"full_layers names every layer with full attention ({_listed(config, 'full')}), which "
            "leaves none for the window and the memory: name fewer, or load the base model alone."
        )
    return tuple(kinds)


def _listed(config: ModelConfig, kind: LayerKind) -> str:
    found = [str(i) for i, each in enumerate(config.layer_kinds) if each == kind]
    return ", ".join(found) or "none"


def memory_layers(config: ModelConfig, liza: LizaConfig | None) -> tuple[int, ...]:
    """The layers of a model that have a memory, in order."""
    if liza is None:
        return ()
    return tuple(i for i, kind in enumerate(layer_kinds(config, liza)) if liza.has_memory(kind))


def runs_memory(config: ModelConfig, liza: LizaConfig | None) -> bool:
    """Whether any layer's memory ever holds tokens."""
    return liza is not None and any(map(liza.runs_memory, set(layer_kinds(config, liza))))
