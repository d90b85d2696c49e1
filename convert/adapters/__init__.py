"""PEFT directories: LoRA adapters that `peft` reads and writes.

Offered: recognising, opening, fitting, describing and writing them.
"""

from convert.adapters.config import is_adapter, read_adapter_config
from convert.adapters.embeddings import without_copies
from convert.adapters.export import check_adapter, write_adapter
from convert.adapters.reading import (
    Adapter,
    FittedAdapter,
    describe_adapter,
    fit_adapter,
    open_adapter,
)

__all__ = [
    "Adapter",
    "FittedAdapter",
    "check_adapter",
    "describe_adapter",
    "fit_adapter",
    "is_adapter",
    "open_adapter",
    "read_adapter_config",
    "without_copies",
    "write_adapter",
]
