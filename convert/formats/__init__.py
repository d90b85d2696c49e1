"""File formats: safetensors, GGUF, Hugging Face directories, JSON, and atomic writing.

Offered: readers, specs and writers of tensors; further functions are in the modules.
"""

from convert.formats.gguf_io import GgufFile
from convert.formats.hf_directory import SafetensorsDirectory, write_weights
from convert.formats.safetensors_io import SafetensorsFile, TensorSpec, write_safetensors
from convert.formats.tensors import TensorInfo, TensorSource

__all__ = [
    "GgufFile",
    "SafetensorsDirectory",
    "SafetensorsFile",
    "TensorInfo",
    "TensorSource",
    "TensorSpec",
    "write_safetensors",
    "write_weights",
]
