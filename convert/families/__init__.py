"""The families of models that can be read and written, one file each.

Offered: the table of families, and finding the one of a configuration.
"""

from convert.errors import ConversionError, listing
from convert.families import (
    gemma3,
    gpt2,
    llama,
    mistral,
    olmo,
    olmo2,
    olmoe,
    openelm,
    qwen2,
    qwen3,
    titan,
)
from convert.families.family import Family, GgufTable

_MODULES = (gemma3, gpt2, llama, mistral, olmo, olmo2, olmoe, openelm, qwen2, qwen3)
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
# Our own export holds a model of any family.
_READABLE = FAMILIES | {titan.FAMILY.model_type: titan.FAMILY}
_BY_ARCHITECTURE = {
    family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None
}


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face model type.

    Raises:
      ConversionError: if the type is unknown.
    """
    if model_type == "gemma3":
        raise ConversionError(
            'model_type "gemma3" is the multimodal wrapper around Gemma 3; only the text model '
            '("gemma3_text") is supported: use a text-only checkpoint such as '
            "google/gemma-3-270m or google/gemma-3-1b-it."
        )
    if model_type not in _READABLE:
        raise ConversionError(
            f"model_type {model_type!r} is not supported; supported: {listing(_READABLE)}."
        )
    return _READABLE[model_type]


def family_of_architecture(architecture: str) -> tuple[Family, GgufTable]:
    """The family of a GGUF file's `general.architecture`, and its GGUF table.

    Raises:
      ConversionError: if the architecture is unknown.
    """
    family = _BY_ARCHITECTURE.get(architecture)
    if family is None or family.gguf is None:
        raise ConversionError(
            f"GGUF architecture {architecture!r} is not supported; supported: "
            f"{listing(_BY_ARCHITECTURE)}."
        )
    return family, family.gguf


__all__ = ["FAMILIES", "Family", "GgufTable", "family_of", "family_of_architecture"]
