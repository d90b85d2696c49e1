"""A grid's YAML file, and its runs."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.command_line import read_yaml, unresolved_defaults
from experiments.training import FinetuneConfig

Settings = dict[str, Any]

_BLOCKS = ("base", "variants", "grid")
# Options of the command, not of a variant.
_OWN = ("config", "output")


@dataclass(frozen=True)
class Variant:
    """One run of finetune."""

    name: str
    settings: Settings
    """Content of its YAML file, in blocks."""

    @property
    def folder(self) -> str:
        """The name, made valid for a directory."""
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-.")


def read_plan(path: Path) -> list[Variant]:
    """Reads the variants of a grid, in order, and checks the settings of each.

    The file has up to three blocks. `base` holds settings as a configuration of finetune does;
    `variants` names changes to them; `grid` names settings, dotted or in blocks, with a list of
    values for each. Every variant comes with every combination of the grid.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is invalid, in one sentence.
    """
    content = read_yaml(path)
    _check_unique(path)
    for name, block in content.items():
        if name not in _BLOCKS:
            raise ValueError(f"{path}: there is no block {name}; use {', '.join(_BLOCKS)}.")
        if not isinstance(block, Mapping | None):
            raise ValueError(f"{path}: {name} must be a block of names, got {block!r}.")
    base = nested(content.get("base") or {}, where=f"{path}: base")
    points = list(_points(path, content.get("grid") or {}))
    variants = [
        Variant(", ".join(filter(None, (name, label))), merged(merged(base, changes), point))
        for name, changes in _named(path, content.get("variants") or {"": {}})
        for label, point in points
    ]
    if not any(variant.name for variant in variants):
        raise ValueError(f"{path} names no runs: add variants, or a grid of settings and values.")
    _check_folders(path, variants)
    for variant in variants:
        _check_settings(path, variant)
    return variants


def nested(values: Mapping[str, Any], *, where: str) -> Settings:
    """Settings with dotted names as blocks: ``liza.mag: x`` is ``liza: {mag: x}``.

    Raises:
      ValueError: if a setting is given twice.
    """
    if isinstance(path := values.get("data"), str):
        values = {**values, "data": {"path": path}}  # "data: x.jsonl", as --data x.jsonl
    result: Settings = {}
    for name, value in leaves(values):
        *blocks, last = name.split(".")
        place: Any = result
        for block in blocks:
            place = place.setdefault(block, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict) or last in place:
            raise ValueError(f"{where}: {name} is given twice: leave one out.")
        place[last] = value
    return result


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Settings with changes: blocks are joined, values replaced."""
    result = dict(base)
    for name, value in changes.items():
        known = result.get(name)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            value = merged(known, value)
        result[name] = value
    return result


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _named(path: Path, variants: Mapping[str, Any]) -> Iterator[tuple[str, Settings]]:
    for name, changes in variants.items():
        if not isinstance(changes, Mapping | None):
            raise ValueError(
                f"{path}: variant {name!r} must be a block of settings, got {changes!r}."
            )
        yield str(name), nested(changes or {}, where=f"{path}: variant {name!r}")


def _points(path: Path, grid: Mapping[str, Any]) -> Iterator[tuple[str, Settings]]:
    """Every combination of the grid's values, and its name."""
    axes = dict(leaves(nested(grid, where=f"{path}: grid")))
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid: {name} must be a list of values, got {values!r}.")
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        label = ", ".join(f"{name}={value}" for name, value in point.items())
        yield label, nested(point, where=f"{path}: grid")


def _check_unique(path: Path) -> None:
    """Raises if a block has a name twice; YAML would silently use the last."""
    pending = [yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    while pending:
        node = pending.pop()
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{path}, line {line}: {key.value!r} occurs twice: rename one.")
            seen.add(key.value)
            pending.append(value)


def _check_folders(path: Path, variants: list[Variant]) -> None:
    seen: dict[str, str] = {}
    for variant in variants:
        if not variant.folder:
            raise ValueError(f"{path}: {variant.name!r} gives no directory name: use letters.")
        other = seen.setdefault(variant.folder.casefold(), variant.name)
        if other is not variant.name:
            raise ValueError(
                f"{path}: the variants {other!r} and {variant.name!r} would share the directory "
                f"{variant.folder}: rename one."
            )


def _check_settings(path: Path, variant: Variant) -> None:
    where = f"{path}: variant {variant.name!r}"
    for name in _OWN:
        if name in variant.settings:
            raise ValueError(
                f"{where}: leave {name} out: each variant has a directory of its own in --output."
            )
    default = unresolved_defaults(FinetuneConfig, None, variant.settings, where=where)
    try:
        _validated(default)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _validated(config: Any) -> Any:
    """The same configuration, validated."""
    if not dataclasses.is_dataclass(config):
        return config
    names = [field.name for field in dataclasses.fields(config)]
    return type(config)(**{name: _validated(getattr(config, name)) for name in names})
