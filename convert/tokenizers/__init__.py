"""Tokenizers of Hugging Face directories and of GGUF files, without torch.

Offered: loading a tokenizer, exporting its files, the name of its class.
"""

from convert.tokenizers.loading import export_tokenizer, load_tokenizer, tokenizer_class_of

__all__ = ["export_tokenizer", "load_tokenizer", "tokenizer_class_of"]
