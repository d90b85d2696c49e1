"""Resolves model names to files: directories, hub ids, GGUF files, packaged models.

Offered: parsing names, and locating and opening models.
"""

from convert.sources.demo import DEFAULT_MODEL, PACKAGED_HUB_IDS, PACKAGED_SOURCES
from convert.sources.hub_names import HubName, parse_hub_name, with_revision
from convert.sources.opening import Pretrained, Source, find_checkpoint, locate, open_pretrained

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED_HUB_IDS",
    "PACKAGED_SOURCES",
    "HubName",
    "Pretrained",
    "Source",
    "find_checkpoint",
    "locate",
    "open_pretrained",
    "parse_hub_name",
    "with_revision",
]
