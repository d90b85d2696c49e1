"""The description of a family of models for `convert`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert.errors import ConversionError, listing
from convert.families.fields import Fields
from convert.formats import GgufFile
from convert.rules import Rule
from tptt_jax import LizaConfig, ModelConfig
from tptt_jax.config import flat_settings, place_of

Rules = Callable[[ModelConfig], tuple[Rule, ...]]


@dataclass(frozen=True, kw_only=True)
class GgufTable:
    """How llama.cpp stores the family."""

    architecture: str
    """Its `general.architecture`."""
    read_config: Callable[[GgufFile], ModelConfig]
    rules: Rules
    """GGUF tensor names <-> our paths."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of whole names of tensors that we do not use."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Hugging Face model type: its configuration both ways, and its key table."""

    model_type: str
    architecture: str
    """The transformers class, e.g. "LlamaForCausalLM"."""
    read_config: Callable[[Fields], ModelConfig]
    """config.json, published or transformers-5 form -> ours."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """Ours -> the keys of config.json, transformers-5 form."""
    rules: Rules
    """Safetensors names <-> our paths."""
    write_old_config: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    """Ours -> published keys that an export has beside the transformers-5 form: transformers 4,
    vLLM and llama.cpp's converter use defaults if these are missing."""
    read_liza: Callable[[Fields], LizaConfig | None] | None = None
    """config.json -> the memory, of a format that keeps it beside the base weights."""
    superseded: tuple[str, ...] = ()
    """Published keys of config.json that become invalid if the model changes: replaced by
    `write_config` and `write_old_config`."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of whole names of tensors that may stay unread."""
    prefix: str = "model."
    """Prefix that is missing in checkpoints of the bare decoder."""
    gguf: GgufTable | None = None

    def config_json(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json that express `config`.

        Raises:
          ConversionError: if `config` has a setting that the family cannot express.
        """
        content = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.write_config(config),
        }
        back = self.read_config(Fields(content, "the exported config.json"))
        kept, asked = flat_settings(back), flat_settings(config)
        lost = [".".join(place_of(name)) for name in asked if kept[name] != asked[name]]
        if lost:
            raise ConversionError(
                f"A {self.model_type} model of transformers cannot express this model's "
                f"{listing(lost)}; export only models that fit their family."
            )
        return content


def is_match(patterns: tuple[str, ...], name: str) -> bool:
    """Whether one of the regular expressions matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
