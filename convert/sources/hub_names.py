"""Names of models on the Hugging Face hub, with an optional revision."""

import os
import re
from typing import NamedTuple

from convert.errors import ConversionError
from convert.sources.demo import PACKAGED_SOURCES

_NAME = r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?"
# No part may begin with a dot: the name becomes a path in the hub's cache.
_REVISION = r"\w[\w.-]*(?:/\w[\w.-]*)*"
_SOURCE = re.compile(f"({_NAME})(?:@({_REVISION}))?")
_LONGEST = 96


class HubName(NamedTuple):
    """A model on the hub."""

    name: str
    """E.g. "HuggingFaceTB/SmolLM2-135M"."""
    revision: str | None
    """A branch, a tag or a commit; None: the main branch."""

    def __str__(self) -> str:
        """As `load_pretrained` takes it: "name" or "name@revision"."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """Reads "name" or "name@revision"; None if `text` cannot be the name of a model on the hub."""
    found = _SOURCE.fullmatch(text)
    if found is None or len(found[1]) > _LONGEST:
        return None
    return HubName(found[1], found[2])


def with_revision(source: str | os.PathLike[str], revision: str | None) -> str:
    """Adds --revision to --model.

    Args:
      source: what `load_pretrained` takes.
      revision: of a model on the hub; None: as `source` says.

    Returns:
      What `load_pretrained` takes.

    Raises:
      ConversionError: if `source` is not a hub id, if it names another revision itself, or if the
        revision is invalid.
    """
    name = os.fspath(source)
    if revision is None:
        return name
    hub = parse_hub_name(name)
    is_other = name in PACKAGED_SOURCES or name.endswith(".gguf") or os.path.exists(name)
    if hub is None or is_other:
        raise ConversionError(
            f"--revision {revision!r:.80} is for models of the Hugging Face hub, but {name} is "
            "not a hub id; leave it out, or give one such as HuggingFaceTB/SmolLM2-135M."
        )
    if hub.revision not in (None, revision):
        raise ConversionError(
            f"{name} names another revision than --revision {revision!r:.80}; give one of them."
        )
    chosen = parse_hub_name(f"{hub.name}@{revision}")
    if chosen is None:
        raise ConversionError(
            f"--revision {revision!r:.80} must be a branch, a tag or a commit of {hub.name}."
        )
    return str(chosen)
