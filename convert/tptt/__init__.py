"""Directories of the package tptt 0.12.1: LoRA adapters or weights around a base model.

Offered: recognising, opening, fitting, describing and writing them.
"""

from convert.tptt.checkpoint import FittedTptt, describe_tptt, fit_tptt, open_tptt
from convert.tptt.config import is_tptt, read_tptt_config
from convert.tptt.export import check_tptt, write_tptt

__all__ = [
    "FittedTptt",
    "check_tptt",
    "describe_tptt",
    "fit_tptt",
    "is_tptt",
    "open_tptt",
    "read_tptt_config",
    "write_tptt",
]
