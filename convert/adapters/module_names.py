"""Hugging Face's names of the modules behind our projections."""

from collections.abc import Iterable

from convert.rules import Rule
from tptt_jax import ModelConfig

_KERNEL, _WEIGHT = ".kernel", ".weight"


def module_names(rules: Iterable[Rule], config: ModelConfig) -> dict[str, str]:
    """Pairs every projection that is a separate module on both sides.

    Projections that a rule joins or splits are left out: they have no single module.

    Args:
      rules: the family's key table for safetensors names.
      config: of the model.

    Returns:
      Our dotted path, with the layer's number in the checkpoint, and the name of the module,
      e.g. "layers.3.self_attn.q_proj": "model.layers.3.self_attn.q_proj". Includes a head that is
      tied to the embedding.
    """
    names: dict[str, str] = {}
    for rule in rules:
        if len(rule.sources) != 1 or len(rule.targets) != 1:
            continue
        theirs, ours = rule.sources[0], rule.targets[0]
        if not (theirs.endswith(_WEIGHT) and ours.endswith(_KERNEL)):
            continue
        theirs, ours = theirs.removesuffix(_WEIGHT), ours.removesuffix(_KERNEL)
        for layer in map(str, range(config.num_layers if "{layer}" in ours else 1)):
            names[ours.replace("{layer}", layer)] = theirs.replace("{layer}", layer)
    return names


def weighted_modules(rules: Iterable[Rule], config: ModelConfig) -> set[str]:
    """Every module of a Hugging Face model with a tensor in the family's key table."""
    sources = {source for rule in rules for source in rule.sources}
    return {
        source.replace("{layer}", str(layer)).rsplit(".", 1)[0]
        for source in sources
        for layer in range(config.num_layers if "{layer}" in source else 1)
    }
