"""Tokenizers of Hugging Face directories and of GGUF files, without torch."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.adapters import is_adapter
from convert.bases import has_base, locate_base
from convert.errors import ConversionError, listing
from convert.formats import GgufFile
from convert.formats.files import atomic_directory, check_regular
from convert.notices import print_notice
from convert.sources import Source, find_checkpoint, locate
from convert.sources.demo import cache_directory
from convert.sources.source_files import TOKENIZER_FILES, VOCABULARY_FILES, copy_tokenizer_files
from convert.tokenizers.directory import (
    TOKENIZER_FILE,
    import_transformers,
    read_adapter_tokenizer,
    read_directory_tokenizer,
    refusing,
)
from convert.tokenizers.settings import SETTINGS_FILE, make_portable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_METADATA = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unk_token_id",
    "pad_token": "pad_token_id",
}
# llama.cpp begins every text of these with BOS even if the file does not say so.
_PRE_WITH_BOS = ("llama3", "llama-v3", "llama-bpe")


def load_tokenizer(source: Source, *, adapter: Source | None = None) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer that belongs to a model.

    Args:
      source: what `load_pretrained` takes. A checkpoint of our own has the tokenizer of the
        model it was trained from, a directory of tptt's that of its base model, and so has one of
        PEFT's unless it brings a complete tokenizer.
      adapter: what `load_pretrained` puts on `source`; its tokenizer, if complete, goes before
        that of `source`.

    Returns:
      A fast tokenizer with the source's special tokens and chat template.

    Raises:
      ConversionError: if the source has no readable tokenizer.
    """
    path = locate_tokenizer(source, adapter=adapter)
    if path.is_dir():
        if is_adapter(path):
            return read_adapter_tokenizer(path)
        return read_directory_tokenizer(path)
    return _cached(path) if path.parent == cache_directory() else _from_gguf(path)


def locate_tokenizer(source: Source, *, adapter: Source | None = None) -> Path:
    """Finds the directory or GGUF file that holds the tokenizer of a model.

    Args:
      source: what `load_tokenizer` takes.
      adapter: likewise.

    Returns:
      Of a PEFT directory with a complete tokenizer (tokenizer.json and tokenizer_config.json):
      that directory, as the adapter was trained with it. Otherwise the path of the base model.

    Raises:
      ConversionError: if the model does not exist.
    """
    if adapter is not None and (own := _adapter_tokenizer(locate(adapter, weights=False))):
        return own
    while described := find_checkpoint(source):
        source = described.source
    path = locate(source, weights=False)
    return (
        (_adapter_tokenizer(path) or locate_base(path, weights=False)) if has_base(path) else path
    )


def _adapter_tokenizer(path: Path) -> Path | None:
    """A PEFT directory if its tokenizer is complete; which one is used is said if it has files."""
    if not is_adapter(path):
        return None
    own = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    if {TOKENIZER_FILE, SETTINGS_FILE} <= set(own):
        print_notice(f"using the tokenizer of the adapter {path} ({listing(own)})")
        return path
    if own:
        print_notice(
            f"using the tokenizer of the base model; {listing(own)} of the adapter {path} is "
            f"no complete tokenizer ({TOKENIZER_FILE} and {SETTINGS_FILE})"
        )
    return None


def export_tokenizer(source: Source, path: Path) -> None:
    """Writes the tokenizer of a model, with its chat template, into a directory.

    Args:
      source: what `load_tokenizer` takes. The tokenizer files of a directory are copied
        unchanged, if it has any (see `copy_tokenizer_files`), except for settings that
        transformers 4 would not read (see `make_portable`). A notice says if it has none.
      path: an existing directory.

    Raises:
      ConversionError: if the tokenizer of a GGUF file, tokenizer.json or tokenizer_config.json
        cannot be read.
    """
    place = locate_tokenizer(source)
    if place.is_dir():
        copy_tokenizer_files(place, path)
        _check_copy(path / TOKENIZER_FILE, place / TOKENIZER_FILE)
        if not any((path / name).is_file() for name in VOCABULARY_FILES):
            print_notice(f"no tokenizer was written, as {place} has none: add its {TOKENIZER_FILE}")
    else:
        tokenizer = load_tokenizer(place)
        with refusing(f"the tokenizer cannot be written to {path}", "free some space"):
            tokenizer.save_pretrained(path)
    make_portable(path, place)


def _check_copy(copy: Path, original: Path) -> None:
    """Refuses a tokenizer.json that is empty or truncated; the export would not load."""
    if not copy.is_file():
        return
    try:
        is_object = isinstance(json.loads(copy.read_bytes()), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ConversionError(
            f"{original} is not a JSON object, so it is empty, truncated or damaged: "
            "fetch it again."
        )


def tokenizer_class_of(model_type: str) -> str:
    """The tokenizer class of a model type in transformers, if no file names one."""
    import_transformers()
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(model_type) or "PreTrainedTokenizerFast"


def _cached(path: Path) -> "PreTrainedTokenizerFast":
    """The demo's tokenizer; cached beside the file, as deriving its merges takes seconds."""
    transformers = import_transformers()
    cache = path.with_name(f"{path.stem}.tokenizer-{transformers.__version__}")
    if not cache.is_dir():
        tokenizer = _from_gguf(path)
        # Another process may have written it first, with the same result.
        with contextlib.suppress(ConversionError, OSError), atomic_directory(cache) as directory:
            tokenizer.save_pretrained(directory)
        return tokenizer
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(cache))


def _from_gguf(path: Path) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer from a GGUF file's metadata."""
    transformers = import_transformers()
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    check_regular(path)
    metadata = GgufFile(path).metadata
    described = {
        name: metadata[f"tokenizer.ggml.{key}"]
        for key, name in _METADATA.items()
        if f"tokenizer.ggml.{key}" in metadata
    }
    remedy = "give a Hugging Face directory of the same model"
    with refusing(f"{path} has no tokenizer that can be read", remedy):
        backend, _ = convert_gguf_tokenizer(str(metadata.get("general.architecture")), described)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, **_settings(metadata, described)
        )


def _settings(metadata: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the tokenizer class beside the vocabulary."""
    begins = (
        described.get("tokenizer_type") == "llama"
        or described.get("pre_tokenizer_type") in _PRE_WITH_BOS
    )
    settings: dict[str, Any] = {
        name: described["tokens"][described[key]]
        for name, key in _SPECIAL.items()
        if described.get(key) is not None
    }
    settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", begins)
    settings["add_eos_token"] = metadata.get("tokenizer.ggml.add_eos_token", False)
    settings["clean_up_tokenization_spaces"] = False
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    return settings
