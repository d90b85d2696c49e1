"""Pretrained models in and out: Hugging Face directories, the hub, GGUF, our checkpoints.

Offered: loading a model or its tokenizer, and exporting. The command is in `__main__`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.errors import ConversionError
    from convert.pretrained import export_pretrained, load_pretrained
    from convert.tokenizers import load_tokenizer

__all__ = ["ConversionError", "export_pretrained", "load_pretrained", "load_tokenizer"]

# Imported when first used: `python -m convert` runs this file before its first line can handle
# Ctrl-C, and commands import `convert.interrupts` before jax.
_MODULES = {
    "ConversionError": "convert.errors",
    "export_pretrained": "convert.pretrained",
    "load_pretrained": "convert.pretrained",
    "load_tokenizer": "convert.tokenizers",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return globals()[name]

    def __dir__():
        return sorted(globals().keys() | _MODULES.keys())
