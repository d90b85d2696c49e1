"""Pretrained models in and out: Hugging Face directories, the hub, GGUF, our checkpoints."""

from convert.errors import ConversionError
from convert.pretrained import export_pretrained, load_pretrained
from convert.tokenizers import load_tokenizer

__all__ = ["ConversionError", "export_pretrained", "load_pretrained", "load_tokenizer"]
