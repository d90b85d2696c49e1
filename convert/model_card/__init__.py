"""The README.md of an exported model: description, recipe, measurements, loading, licence.

Offered: writing a card, reading what it quotes, and naming the model anew when it is pushed.
"""

from convert.model_card.public_text import (
    is_local_path,
    local_paths,
    name_paths,
    public_text,
    public_value,
)
from convert.model_card.results import load_results, read_results
from convert.model_card.run_summary import SUMMARY, SUMMARY_FORMAT, RunSummary, summary_of
from convert.model_card.writing import Origin, find_origin, rename_card, write_card

__all__ = [
    "SUMMARY",
    "SUMMARY_FORMAT",
    "Origin",
    "RunSummary",
    "find_origin",
    "is_local_path",
    "load_results",
    "local_paths",
    "name_paths",
    "public_text",
    "public_value",
    "read_results",
    "rename_card",
    "summary_of",
    "write_card",
]
