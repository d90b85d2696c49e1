"""From what a user names to files: directories, hub ids, GGUF files, models that are packages.

Offered: names, and locating and opening what they mean.
"""

from convert.sources.demo import DEFAULT_MODEL, PACKAGED_SOURCES
from convert.sources.hub_names import HubName, parse_hub_name, with_revision
from convert.sources.opening import Pretrained, Source, find_checkpoint, locate, open_pretrained

__all__ = [
    "DEFAULT_MODEL",
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
