"""What an export changes in a tokenizer's settings."""

import json
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.formats.files import read_json

SETTINGS_FILE = "tokenizer_config.json"
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of the class that tokenizer.json fully describes: in transformers 5, and in 4 and 5."""


def make_portable(directory: Path, source: Path) -> None:
    """Rewrites the settings of an exported tokenizer so that transformers 4 reads them, too.

    The generic class and the list of extra special tokens get the names that both versions
    know, and references to the repository's code, which is not exported, are removed.

    Args:
      directory: its tokenizer_config.json is rewritten, if there is one that needs it.
      source: the model whose tokenizer it is, for errors.

    Raises:
      ConversionError: if tokenizer_config.json is malformed.
    """
    path = directory / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        content = read_json(path)
    except ConversionError as error:
        problem = str(error).replace(str(path), str(source / SETTINGS_FILE))
        raise ConversionError(f"{problem} Repair it.") from None
    changed = _portable(content)
    if changed != content:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _portable(content: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in content.items() if key != "auto_map"}
    if content.get("tokenizer_class") in GENERIC_CLASSES:
        content["tokenizer_class"] = GENERIC_CLASSES[-1]
    # transformers 4 fails on a list of this name; a dict has another meaning in both versions.
    if isinstance(content.get("extra_special_tokens"), list):
        tokens = content.get("additional_special_tokens") or []
        extra = content.pop("extra_special_tokens")
        content["additional_special_tokens"] = [*tokens, *(t for t in extra if t not in tokens)]
    return content
