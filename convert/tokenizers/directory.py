"""The tokenizer of a Hugging Face directory: by transformers' class, or by tokenizer.json.

Many classes of transformers 5 rebuild their normalizer and pre-tokenizer from scratch and take
only the vocabulary from tokenizer.json. If a directory names an unsuitable class, the ids differ
from those of training.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConversionError
from convert.formats.files import check_regular, read_json
from convert.sources.source_files import TOKENIZER_FILES
from convert.tokenizers.settings import GENERIC_CLASSES, SETTINGS_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
# Model types for which transformers ignores the class in the files.
_CLASS_BY_MODEL_TYPE = ("mistral", "qwen2")
# Texts on which normalizers and pre-tokenizers differ: blanks, line ends, letters, digits, bytes.
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
      tokenizer_config.json. Its class is transformers' choice, unless that gives other ids than
      the directory's tokenizer.json; then it is a `PreTrainedTokenizerFast` of the file.

    Raises:
      ConversionError: if there is no readable tokenizer.
    """
    transformers = import_transformers()
    with _reading(path):
        if _is_generic(path):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        has_file = (path / TOKENIZER_FILE).is_file()
        try:
            # False: never run a repository's own code, and do not prompt for permission.
            found = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception:
            # A class may fail on the file's vocabulary although the file is valid.
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
      ConversionError: if there is no readable tokenizer.
    """
    transformers = import_transformers()
    with _reading(path):
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Refuses damaged files, and pipes, devices and directories in place of files."""
    for name in ("config.json", *TOKENIZER_FILES):
        check_regular(path / name)
    with refusing(f"{path} has no tokenizer that can be read", "replace its tokenizer files"):
        yield


def _agrees(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer gives the ids of tokenizer.json for the probe texts."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    # Some files store settings for batches, which are not part of the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    return all(
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == backend.encode(text, add_special_tokens=False).ids
        for text in (*_PROBES, _special_text(backend))
    )


def _special_text(backend: "Tokenizer") -> str:
    """Text between special tokens: some classes start a new text after each."""
    added = backend.get_added_tokens_decoder().values()
    names = [token.content for token in added][:_MAX_SPECIAL_TOKENS]
    return "".join(f"{name}text {name} " for name in names)


def _names_code(path: Path) -> bool:
    """Whether the tokenizer is the repository's own code, which is not run."""
    settings = path / SETTINGS_FILE
    return settings.is_file() and "auto_map" in read_json(settings)


def _is_generic(path: Path) -> bool:
    """Whether transformers would use its generic class; the check imports torch."""
    files = (TOKENIZER_FILE, SETTINGS_FILE, "config.json")
    if not all((path / name).is_file() for name in files):
        return False
    settings, config = (read_json(path / name) for name in files[1:])
    return (
        settings.get("tokenizer_class") in GENERIC_CLASSES
        and "auto_map" not in settings
        and config.get("model_type") not in _CLASS_BY_MODEL_TYPE
    )


@contextlib.contextmanager
def refusing(problem: str, remedy: str) -> Iterator[None]:
    """Turns exceptions of transformers and tokenizers into one sentence.

    On damaged files they raise arbitrary exceptions, and Rust raises a bare Exception.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConversionError(
            f"{problem} ({type(error).__name__}: {reason:.300}); {remedy}."
        ) from None


def import_transformers() -> Any:
    """The package, without its advice about a missing torch."""
    # Its import takes two seconds.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
