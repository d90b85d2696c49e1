"""Removes the names of training wrappers and multimodal models from tensor names.

torch.compile, FSDP and activation checkpointing wrap modules, and data parallelism wraps the whole
model; a state dict of the wrapped model has their names.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from convert.errors import ConversionError, listing
from convert.formats.tensors import TensorInfo, TensorSource

# Removed anywhere: no module of a model has these names.
_INSERTED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Removed at the start only, as a module of a model may have this name.
_OUTER = "module."
# The text model inside a multimodal one, and its place in a text model.
_TEXT = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
_MAX_NAMED = 5


def plain_names(names: Iterable[str], origin: str, prefix: str = "") -> dict[str, str]:
    """Removes the names of wrappers from tensor names.

    Args:
      names: stored names.
      origin: the checkpoint, for error messages.
      prefix: prefix before the model's names, e.g. PEFT's "base_model.model.".

    Returns:
      The stored name, by plain name.

    Raises:
      ConversionError: if two tensors would have the same name.
    """
    stored = list(names)
    plain = [_INSERTED.sub("", name) for name in stored]
    while plain and all(name.startswith(_OUTER) for name in plain):
        plain = [name.removeprefix(_OUTER) for name in plain]
    plain = [_text_name(name, prefix) for name in plain]
    by_name: dict[str, list[str]] = {}
    for name, original in zip(plain, stored, strict=True):
        by_name.setdefault(name, []).append(original)
    if twice := [originals for originals in by_name.values() if len(originals) > 1]:
        pairs = "; ".join(listing(originals) for originals in twice[:_MAX_NAMED])
        raise ConversionError(
            f"{origin} holds the same tensor under several names, of wrappers (torch.compile, "
            f"FSDP, a multimodal model) or without: {pairs}. Remove all but one."
        )
    return {name: originals[0] for name, originals in by_name.items()}


def _text_name(name: str, prefix: str) -> str:
    if name.startswith(prefix):
        inner = name.removeprefix(prefix)
        for theirs, ours in _TEXT:
            if inner.startswith(theirs):
                return prefix + ours + inner.removeprefix(theirs)
    return name


class PlainNames:
    """A checkpoint under its plain names (see `plain_names`)."""

    def __init__(self, source: TensorSource, origin: str):
        """Wraps `source`; `origin` names it in error messages."""
        self._source = source
        self._stored = plain_names(source.tensors, origin)
        self._tensors = {name: source.tensors[own] for name, own in self._stored.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by plain name."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor by its plain name (see `TensorSource.read`)."""
        return self._source.read(self._stored[name])
