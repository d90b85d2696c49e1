"""Training data: from files, folders and Hub datasets to rows of tokens, part of them held out.

Offered: `DataConfig`, `load_token_data` and its result, and Python's own documentation.
"""

from experiments.data.config import DataConfig
from experiments.data.loading import TokenData, load_token_data
from experiments.data.packing import TokenBatch, TokenBatchSource
from experiments.data.rows import python_docs_text

__all__ = [
    "DataConfig",
    "TokenBatch",
    "TokenBatchSource",
    "TokenData",
    "load_token_data",
    "python_docs_text",
]
