"""Tokenizers of Hugging Face directories and of GGUF files, without torch."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.bases import has_base, locate_base
from convert.demo import cache_directory
from convert.errors import ConversionError
from convert.files import atomic_directory, read_json
from convert.gguf_io import GgufFile
from convert.sources import TOKENIZER_PATTERNS, Source, find_checkpoint, locate

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
# What transformers 5 calls a tokenizer that tokenizer.json says everything about.
_GENERIC_CLASS = "TokenizersBackend"
# For these it goes by the model, whatever the files say.
_CLASS_BY_MODEL_TYPE = ("mistral", "qwen2")
# llama.cpp begins every text of these with BOS even where the file does not say so.
_PRE_WITH_BOS = ("llama3", "llama-v3", "llama-bpe")


def load_tokenizer(source: Source) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer that belongs to a model.

    Args:
      source: what `load_pretrained` takes. A checkpoint of our own has the tokenizer of the
        model it was trained from, a directory of PEFT's or tptt's that of its base model.

    Returns:
      A fast tokenizer; special tokens and the chat template are set as the source has them.

    Raises:
      ConversionError: if the source has no tokenizer, or one that cannot be read.
    """
    if described := find_checkpoint(source):
        return load_tokenizer(described.source)
    path = locate(source, weights=False)
    if has_base(path):
        path = locate_base(path, weights=False)
    if path.is_dir():
        return _from_directory(path)
    return _cached(path) if path.parent == cache_directory() else _from_gguf(path)


def export_tokenizer(source: Source, path: Path) -> None:
    """Writes the tokenizer of a model, with its chat template, into a directory.

    Args:
      source: what `load_tokenizer` takes. The files of a Hugging Face directory are copied
        as they are, if it has any.
      path: an existing directory.

    Raises:
      ConversionError: if the tokenizer of a GGUF file cannot be read.
    """
    if described := find_checkpoint(source):
        export_tokenizer(described.source, path)
        return
    place = locate(source, weights=False)
    if not place.is_dir():
        tokenizer = load_tokenizer(place)
        with _refusing(f"the tokenizer cannot be written to {path}", "see that it has room"):
            tokenizer.save_pretrained(path)
        return
    for pattern in TOKENIZER_PATTERNS:
        for file in place.glob(pattern):
            if file.is_file():
                copy = path / file.relative_to(place)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def tokenizer_class_of(model_type: str) -> str:
    """The class that transformers takes for a model type where no file names one."""
    _transformers()
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(model_type) or "PreTrainedTokenizerFast"


def _from_directory(path: Path) -> "PreTrainedTokenizerFast":
    transformers = _transformers()
    with _refusing(f"{path} has no tokenizer that can be read", "replace its tokenizer files"):
        if _is_generic(path):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        # False: a repository's own code is never run, and nobody is asked whether it may be.
        return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def _is_generic(path: Path) -> bool:
    """Whether transformers would take its generic class; finding that out imports torch."""
    files = ("tokenizer.json", "tokenizer_config.json", "config.json")
    if not all((path / name).is_file() for name in files):
        return False
    settings, config = (read_json(path / name) for name in files[1:])
    return (
        settings.get("tokenizer_class") == _GENERIC_CLASS
        and "auto_map" not in settings
        and config.get("model_type") not in _CLASS_BY_MODEL_TYPE
    )


@contextlib.contextmanager
def _refusing(problem: str, remedy: str) -> Iterator[None]:
    """Turns what transformers and tokenizers raise into one sentence.

    They meet damaged files with whatever error comes first, and Rust's is a bare Exception.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConversionError(
            f"{problem} ({type(error).__name__}: {reason:.300}); {remedy}."
        ) from None


def _transformers() -> Any:
    # Without torch it prints advice that nobody here needs; its import takes two seconds.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _cached(path: Path) -> "PreTrainedTokenizerFast":
    """The demo's tokenizer; kept beside the file, as deriving its merges takes seconds."""
    transformers = _transformers()
    cache = path.with_name(f"{path.stem}.tokenizer-{transformers.__version__}")
    if not cache.is_dir():
        tokenizer = _from_gguf(path)
        # Another process may have been faster; its result is the same.
        with contextlib.suppress(ConversionError, OSError), atomic_directory(cache) as directory:
            tokenizer.save_pretrained(directory)
        return tokenizer
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(cache))


def _from_gguf(path: Path) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer that a GGUF file's metadata describe."""
    transformers = _transformers()
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    metadata = GgufFile(path).metadata
    described = {
        name: metadata[f"tokenizer.ggml.{key}"]
        for key, name in _METADATA.items()
        if f"tokenizer.ggml.{key}" in metadata
    }
    remedy = "give a Hugging Face directory of the same model"
    with _refusing(f"{path} has no tokenizer that can be read", remedy):
        backend, _ = convert_gguf_tokenizer(str(metadata.get("general.architecture")), described)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, **_settings(metadata, described)
        )


def _settings(metadata: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """What the tokenizer class needs beside the vocabulary."""
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
