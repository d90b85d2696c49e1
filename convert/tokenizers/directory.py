"""The tokenizer of a Hugging Face directory: the class that transformers takes, or the file's own.

Many classes of transformers 5 rebuild their normalizer and pre-tokenizer from scratch and take
only the vocabulary from tokenizer.json. Where a directory's label does not fit its file, the
result has other ids than the model was trained with.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConversionError
from convert.formats.files import check_regular, read_json
from convert.sources.source_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
# What transformers 5 calls a tokenizer that tokenizer.json says everything about.
_GENERIC_CLASS = "TokenizersBackend"
# For these it goes by the model, whatever the files say.
_CLASS_BY_MODEL_TYPE = ("mistral", "qwen2")
# Where normalizers and pre-tokenizers differ: blanks, line ends, letters, digits, bytes.
_PROBES = (
    "Hello, world! It's 12345 o'clock; isn't it?",
    "  two  and   three blanks ",
    "a line\n\n\nafter some\r\n\ttabs\n",
    "caf\u00e9 e\u0301 \u00df \u4e2d\u6587 \u0627\u0644 \ufb01 \u00bd",
    "\U0001f600 \U0001f469\u200d\U0001f680\u00a0x",
    "def f(x):\n        return x+1.50  # 3,000",
)
_MAX_SPECIAL_TOKENS = 64


def read_directory_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a Hugging Face directory.

    Args:
      path: the directory.

    Returns:
      A fast tokenizer, with the special tokens, chat template and settings of
      tokenizer_config.json. It is of the class that transformers takes, unless that gives other
      ids than the directory's tokenizer.json; then it is a `PreTrainedTokenizerFast` of the file.

    Raises:
      ConversionError: if there is no tokenizer, or one that cannot be read.
    """
    transformers = import_transformers()
    with _reading(path):
        if _is_generic(path):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        has_file = (path / TOKENIZER_FILE).is_file()
        try:
            # False: a repository's own code is never run, and nobody is asked whether it may be.
            found = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception:
            # A class may be unable to take the file's vocabulary; the file itself may be whole.
            if not has_file or _names_code(path):
                raise
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        is_rebuilt = type(found) is not transformers.PreTrainedTokenizerFast
        if has_file and is_rebuilt and not _agrees(found, path / TOKENIZER_FILE):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        return found


def read_adapter_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of an adapter's directory, which has no config.json to name a class.

    Raises:
      ConversionError: if there is no tokenizer, or one that cannot be read.
    """
    transformers = import_transformers()
    with _reading(path):
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Refuses pipes, devices and directories in the place of files, and files that are damaged."""
    for name in ("config.json", *TOKENIZER_FILES):
        check_regular(path / name)
    with refusing(f"{path} has no tokenizer that can be read", "replace its tokenizer files"):
        yield


def _agrees(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer gives the ids of tokenizer.json for texts that tell kinds apart."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    # Settings for batches, not part of the tokenizer: some files have them baked in.
    backend.no_truncation()
    backend.no_padding()
    return all(
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == backend.encode(text, add_special_tokens=False).ids
        for text in (*_PROBES, _special_text(backend))
    )


def _special_text(backend: "Tokenizer") -> str:
    """Text between special tokens: some classes begin a text anew after each."""
    added = backend.get_added_tokens_decoder().values()
    names = [token.content for token in added][:_MAX_SPECIAL_TOKENS]
    return "".join(f"{name}text {name} " for name in names)


def _names_code(path: Path) -> bool:
    """Whether the tokenizer is the repository's own code, which is not run."""
    settings = path / SETTINGS_FILE
    return settings.is_file() and "auto_map" in read_json(settings)


def _is_generic(path: Path) -> bool:
    """Whether transformers would take its generic class; finding that out imports torch."""
    files = (TOKENIZER_FILE, SETTINGS_FILE, "config.json")
    if not all((path / name).is_file() for name in files):
        return False
    settings, config = (read_json(path / name) for name in files[1:])
    return (
        settings.get("tokenizer_class") == _GENERIC_CLASS
        and "auto_map" not in settings
        and config.get("model_type") not in _CLASS_BY_MODEL_TYPE
    )


@contextlib.contextmanager
def refusing(problem: str, remedy: str) -> Iterator[None]:
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


def import_transformers() -> Any:
    """The package, without the advice that it prints where torch is missing."""
    # Its import takes two seconds.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
