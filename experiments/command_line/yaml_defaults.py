"""Values of a YAML file as defaults of a command line, and a configuration as YAML."""

import contextlib
import dataclasses
import difflib
import functools
import types
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def config_path(argv: Sequence[str]) -> Path | None:
    """The path given with ``--config``; tyro needs the defaults before it reads the flags.

    Raises:
      ValueError: if it is given twice.
    """
    paths = [following for flag, following in pairwise(argv) if flag == "--config"]
    paths += [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]
    if len(paths) > 1:
        raise ValueError(f"--config must be given once, got {' and '.join(paths)}.")
    return Path(paths[0]) if paths else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not valid YAML; the message names the line if possible.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(
            f"{path} is a device, a pipe or a socket: write the YAML into a file first."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(
            f"no such file: {path}; check the path given with --config."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or "it is not text"
        raise ValueError(f"{path}{place} is not valid YAML ({problem}): repair it.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: repair it.") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} must hold names and values, got {type(values).__name__}.")
    return values or {}


def unresolved_defaults(
    cls: Any, instance: Any, values: Any, *, where: str, prefix: str = ""
) -> Any:
    """Defaults for tyro: the values of `instance`, or `cls`'s own, overridden by `values`.

    The options of a field marked `tyro.conf.OmitArgPrefixes` have no block of their own.

    `__post_init__` does not run: the values that it derives would look like the user's choices, and
    ``--liza.operator`` would be overruled by the default operator's fields.

    Args:
      cls: a dataclass, whose fields may be dataclasses.
      instance: of `cls`, or None.
      values: from a YAML file; a nested dataclass is a block.
      where: the file's name, for messages.
      prefix: of the names in messages.

    Returns:
      An instance of `cls`, not validated.

    Raises:
      ValueError: if a name or the type of a value is wrong.
    """
    if isinstance(values, str | list) and "path" in cls.__dataclass_fields__:
        values = {"path": values}  # "data: x.jsonl", as --data x.jsonl
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {prefix[:-1]} must be a block of names, got {values!r}.")
    known = _known_names(cls)
    for name in values:
        if name not in known:
            raise ValueError(
                f"{where}: there is no option {prefix}{name}{_remedy(str(name), prefix, known)}"
            )
    hints = get_type_hints(cls)
    result = object.__new__(cls)
    for field in dataclasses.fields(cls):
        name, hint = field.name, hints[field.name]
        value = _default_of(field, instance)
        if dataclasses.is_dataclass(hint):
            given, inner = values.get(name, {}), f"{prefix}{name}."
            if name in _flat_blocks(cls):
                given = {key: values[key] for key in _known_names(hint) if key in values}
                inner = prefix
            value = unresolved_defaults(hint, value, given, where=where, prefix=inner)
        elif name in values:
            value = _checked(values[name], hint, f"{where}: {prefix}{name}")
        object.__setattr__(result, name, value)
    return result


@functools.cache
def _flat_blocks(cls: Any) -> frozenset[str]:
    """The fields of a dataclass whose own fields have no prefix, as flags and in YAML files."""
    hints = get_type_hints(cls, include_extras=True)
    markers = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return frozenset(name for name in markers if tyro.conf.OmitArgPrefixes in markers[name])


def _known_names(cls: Any) -> list[str]:
    """The names that a YAML file may give in the block of a dataclass."""
    names, hints = [], get_type_hints(cls)
    for field in dataclasses.fields(cls):
        is_flat = field.name in _flat_blocks(cls)
        names += _known_names(hints[field.name]) if is_flat else [field.name]
    return [name for name in names if name != "config"]


def _remedy(name: str, prefix: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f": did you mean {prefix}{close[0]}?"
    return f"; the options here are {', '.join(known)}."


def resolved_yaml(config: Any) -> str:
    """A YAML text that reproduces this configuration through ``--config``."""
    values = _plain(_flattened(config, dataclasses.asdict(config)))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _flattened(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass, with those of flat blocks among them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        block = getattr(config, name)
        inner = _flattened(block, value) if dataclasses.is_dataclass(block) else value
        result |= inner if name in _flat_blocks(type(config)) else {name: inner}
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if name != "config"}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _default_of(field: dataclasses.Field[Any], instance: Any) -> Any:
    if instance is None or instance is tyro.MISSING:
        if field.default is not dataclasses.MISSING:
            return field.default
        factory = field.default_factory
        return tyro.MISSING if factory is dataclasses.MISSING else factory()
    value = getattr(instance, field.name)
    derived = field.default is None and value is not None
    if derived and dataclasses.replace(instance, **{field.name: None}) == instance:
        return None
    return value


def _checked(value: Any, hint: Any, place: str) -> Any:
    """A value of a YAML file, converted to its field's type."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        kinds = [choice for choice in choices if choice is not type(None)]
        # Text or several texts.
        fitting = [kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, list)]
        return _checked(value, (fitting or kinds)[0], place)
    if origin is Literal:
        if value in choices:
            return value
        expected = f"one of {', '.join(map(str, choices))}"
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_checked(item, choices[0], place) for item in value)
        expected = "a list"
    elif hint is Path:
        return Path(_checked(value, str, place))
    else:
        if hint is float and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):
                return float(value)  # YAML takes "5e-4", which has no dot, for text
        elif type(value) is hint:
            return value
        expected = _EXPECTED[hint]
    raise ValueError(f"{place} must be {expected}, got {value!r}.")
