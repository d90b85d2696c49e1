"""Places of a model's adapters, by our names and by Hugging Face's."""

import re
from dataclasses import dataclass

from convert.adapters.module_names import module_names
from convert.families import Family, family_of
from convert.loading import Variables
from tptt_jax import ModelConfig
from tptt_jax.decoder import layer_location

PEFT_PREFIX = "base_model.model."
"""PEFT's prefix before the names of the wrapped model."""


@dataclass(frozen=True)
class Place:
    """One projection of one layer, on both sides."""

    module: str
    """Hugging Face's name, e.g. "model.layers.3.self_attn.q_proj"."""
    target: str
    """The name that targets of `LoraConfig` match, e.g. "self_attn.q_proj"."""
    path: str
    """The stacked projection in our model, e.g. "stacks.0.self_attn.q_proj"."""
    index: int
    """The layer on the leading axis of its parameters."""

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of the stored lora_A [rank, in] and lora_B [out, rank]."""
        module = f"{PEFT_PREFIX}{self.module}"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def places_of(
    config: ModelConfig, variables: Variables, family: Family | None = None
) -> list[Place]:
    """The adapters of a model, each on one module of Hugging Face's model.

    Args:
      config: of the model.
      variables: of the model, abstract or not.
      family: with the names of Hugging Face's model, if they are not its own family's.

    Returns:
      One place per layer and adapted projection.
    """
    rules = (family or family_of(config.family)).rules(config)
    names = module_names(rules, config)
    places = []
    for ours, module in names.items():
        if not (parts := re.fullmatch(r"layers\.(\d+)\.(.+)", ours)):
            continue
        stack, index = layer_location(config, int(parts[1]))
        path = f"stacks.{stack}.{parts[2]}"
        if f"{path}.lora.a" in variables:
            places.append(Place(module, parts[2], path, index))
    return places
