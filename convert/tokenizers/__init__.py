"""Tokenizers of Hugging Face directories and of GGUF files, without torch.

Offered: loading one, exporting its files, the class it is labelled with.
"""

from convert.tokenizers.loading import export_tokenizer, load_tokenizer, tokenizer_class_of

__all__ = ["export_tokenizer", "load_tokenizer", "tokenizer_class_of"]
