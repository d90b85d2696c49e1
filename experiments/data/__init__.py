"""Training data: from files, folders and Hub datasets to rows of tokens, part of them held out.

Offered: `DataConfig`, `load_token_data` and `load_stream` with their results, and Python's own
documentation.
"""

from experiments.data.config import DataConfig
from experiments.data.loading import TokenData, load_token_data
from experiments.data.packing import TokenBatch, TokenBatchSource
from experiments.data.rows import python_docs_text
from experiments.data.stream_loading import StreamData, load_stream
from experiments.data.streaming import StreamSource

__all__ = [
    "DataConfig",
    "StreamData",
    "StreamSource",
    "TokenBatch",
    "TokenBatchSource",
    "TokenData",
    "load_stream",
    "load_token_data",
    "python_docs_text",
]
