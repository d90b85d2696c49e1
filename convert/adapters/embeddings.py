"""Copies of the embedding and the head that PEFT saves beside an adapter."""

import dataclasses

import numpy as np

from convert.adapters.places import PEFT_PREFIX
from convert.adapters.reading import Adapter
from convert.errors import ConversionError, listing
from convert.families import Family
from convert.notices import print_notice
from convert.rules import Rule
from convert.sources import Pretrained

_EMBEDDING, _HEAD = "embed.embedding", "lm_head.kernel"


def without_copies(adapter: Adapter, base: Pretrained) -> Adapter:
    """Removes copies of the base model's embedding and head from an adapter.

    PEFT saves them if the vocabulary was resized, or on request.

    Args:
      adapter: the opened adapter.
      base: the base model.

    Returns:
      The adapter without copies that equal the base model's; a line on stderr names them.

    Raises:
      ConversionError: if they are resized or have other values, as the adapter alone is not the
        model then, or if the base model is quantised, so they cannot be compared.
    """
    copies = {}
    for rule in base.family.rules(base.config):
        if len(rule.targets) == 1 and rule.targets[0] in (_EMBEDDING, _HEAD):
            for name in _stored_names(rule, base.family):
                if (stored := f"{PEFT_PREFIX}{name}") in adapter.stored_names:
                    copies[stored] = rule
    if not copies:
        return adapter
    for name, rule in copies.items():
        plain = name.removeprefix(PEFT_PREFIX)
        stored = adapter.file.read(adapter.stored_names[name])
        (copy,) = rule.transform.forward([stored], [stored.shape])
        own = _own_weight(base, rule.targets[0])
        if own is None or copy.shape != own.shape:
            rows = None if own is None else base.config.vocab_size
            raise ConversionError(_resized(adapter, plain, stored, rows))
        if not _is_same(copy, own):
            if base.config_json is None:
                raise ConversionError(
                    f"the base is quantised ({base.path}), so the copy of {plain} in "
                    f"{adapter.path} cannot be compared: use the Hugging Face checkpoint of the "
                    "base."
                )
            raise ConversionError(
                f"{adapter.path} holds a changed {plain}: the adapter alone "
                "is not the model. Merge it first: PeftModel.from_pretrained("
                "AutoModelForCausalLM.from_pretrained(BASE_MODEL), DIR).merge_and_unload()"
                ".save_pretrained(OTHER_DIR) writes a plain model that loads here."
            )
    names = listing(name.removeprefix(PEFT_PREFIX) for name in copies)
    print_notice(
        f"{adapter.path} holds an identical copy of the base model's {names}; it is ignored"
    )
    kept = {name: own for name, own in adapter.stored_names.items() if name not in copies}
    return dataclasses.replace(adapter, stored_names=kept)


def _stored_names(rule: Rule, family: Family) -> tuple[str, str]:
    """The stored name of a rule's single tensor, with the model's prefix and without."""
    (source,) = rule.sources
    return source, source.removeprefix(family.prefix)


def _own_weight(base: Pretrained, target: str) -> np.ndarray | None:
    """The base model's embedding or head in our layout; None if it has none."""
    if target == _HEAD and base.config.tie_embeddings:
        embedding = _own_weight(base, _EMBEDDING)
        return None if embedding is None else embedding.T
    for rule in base.rules:
        if rule.targets != (target,):
            continue
        for name in _stored_names(rule, base.family):
            if name in base.tensors.tensors:
                stored = base.tensors.read(name)
                return rule.transform.forward([stored], [stored.shape])[0]
    return None


def _is_same(copy: np.ndarray, own: np.ndarray) -> bool:
    """Whether both are equal, or one is the other rounded to its dtype."""
    with np.errstate(over="ignore"):
        return np.array_equal(copy, own.astype(copy.dtype)) or np.array_equal(
            copy.astype(own.dtype), own
        )


def _resized(adapter: Adapter, name: str, stored: np.ndarray, rows: int | None) -> str:
    return (
        f"{adapter.path} holds a resized {name} of {len(stored)} tokens, the "
        f"base model has {'none' if rows is None else rows}: the adapter alone is not the model. "
        "Merge it first: model = AutoModelForCausalLM.from_pretrained(BASE_MODEL); "
        f"model.resize_token_embeddings({len(stored)}); PeftModel.from_pretrained(model, DIR)"
        ".merge_and_unload().save_pretrained(OTHER_DIR) writes a plain model that loads here."
    )
