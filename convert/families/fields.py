"""Typed access to a config.json, and fields that most families share."""

import sys
from collections.abc import Mapping
from typing import Any

from convert.errors import ConversionError
from tptt_jax import ModelConfig
from tptt_jax.config import MAX_LAYERS, BaseLayerKind, NormConfig

_REQUIRED = object()
# Sizes and positions are int32 on every device.
_MAX_INTEGER = 2**31 - 1


class Fields:
    """A JSON object whose values are checked when read.

    `null` counts as absent, as in transformers' configurations.
    """

    def __init__(self, raw: Mapping[str, Any], origin: str):
        """Wraps `raw`; `origin` names it in error messages."""
        self.raw = raw
        self.origin = origin

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConversionError(
                    f"{self.origin} lacks {key}: add it, or fetch the file again."
                )
            return default
        # JSON's true is not a number, but Python's True is one.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConversionError(
                f"{key} in {self.origin} must be {expected}, it is {value!r:.200}."
            )
        return value

    def integer(self, key: str, default: Any = _REQUIRED, most: int = _MAX_INTEGER) -> Any:
        """An integer of at most `most`, or `default` if the key is absent or null."""
        value = self._get(key, default, (int,), "an integer")
        if value is not None and abs(value) > most:
            raise ConversionError(
                f"{key} in {self.origin} must be at most {most}, it is {value!r:.200}."
            )
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite float, or `default` if the key is absent or null."""
        value = self._get(key, default, (int, float), "a number")
        if value is not None and not abs(value) <= sys.float_info.max:
            raise ConversionError(f"{key} in {self.origin} must be a finite number.")
        return value if value is None else float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or false, or `default` if the key is absent or null."""
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string, or `default` if the key is absent or null."""
        return self._get(key, default, (str,), "a string")

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None if the key is absent or null."""
        value = self._get(key, None, (list,), "a list of strings")
        if value is not None and not all(isinstance(item, str) for item in value):
            raise ConversionError(f"{key} in {self.origin} must be a list of strings.")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers.

        Raises:
          ConversionError: if the key is absent, or null, or holds something else.
        """
        value = self._get(key, _REQUIRED, (list,), "a list of integers")
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            raise ConversionError(f"{key} in {self.origin} must be a list of integers.")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers.

        Raises:
          ConversionError: if the key is absent, or null, or holds something else.
        """
        value = self._get(key, _REQUIRED, (list,), "a list of numbers")
        if not all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in value):
            raise ConversionError(f"{key} in {self.origin} must be a list of finite numbers.")
        return tuple(map(float, value))

    def object(self, key: str) -> "Fields":
        """A nested object; empty if the key is absent or null."""
        value = self._get(key, {}, (dict,), "an object")
        return Fields(value, f"{key} in {self.origin}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One or several token ids, e.g. of `eos_token_id`."""
        value = self._get(key, (), (int, list), "an integer or a list of integers")
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(item, int) and abs(item) <= _MAX_INTEGER for item in ids):
            raise ConversionError(
                f"{key} in {self.origin} must hold integers up to {_MAX_INTEGER}, it is "
                f"{value!r:.200}."
            )
        return ids

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Raises unless the key is absent or has a supported value."""
        value = self.raw.get(key, default)
        if value not in allowed:
            raise ConversionError(
                f"{key} = {value!r:.200} in {self.origin} is not supported; it must be "
                f"{' or '.join(repr(each) for each in allowed)}."
            )


_KINDS: dict[str, BaseLayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}


def read_layer_kinds(
    fields: Fields, default: tuple[BaseLayerKind, ...]
) -> tuple[BaseLayerKind, ...]:
    """Converts `layer_types`; `default` if a published configuration lacks it.

    Raises:
      ConversionError: for a kind of layer that is not implemented.
    """
    names = fields.texts("layer_types")
    if names is None:
        return default
    unknown = sorted(set(names) - _KINDS.keys())
    if unknown:
        raise ConversionError(
            f"layer_types in {fields.origin} has {', '.join(unknown)}; supported: "
            f"{', '.join(_KINDS)}."
        )
    return tuple(_KINDS[name] for name in names)


def write_layer_kinds(config: ModelConfig) -> list[str]:
    """The inverse of `read_layer_kinds`."""
    names = {kind: name for name, kind in _KINDS.items()}
    return [names[kind] for kind in config.layer_kinds]


def read_token_ids(fields: Fields) -> dict[str, Any]:
    """The special tokens, as arguments of `ModelConfig`."""
    return {
        "bos_token_id": fields.integer("bos_token_id", None),
        "eos_token_ids": fields.token_ids("eos_token_id"),
        "pad_token_id": fields.integer("pad_token_id", None),
    }


def write_token_ids(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_token_ids`."""
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def read_num_layers(fields: Fields) -> int:
    """The number of layers, bounded before anything is allocated for each."""
    return fields.integer("num_hidden_layers", most=MAX_LAYERS)


def read_sizes(fields: Fields) -> dict[str, Any]:
    """The arguments of ModelConfig whose keys are the same in nearly every family.

    Args:
      fields: a config.json.

    Returns:
      Keyword arguments of `ModelConfig`.

    Raises:
      ConversionError: if a required key is absent or of the wrong type.
    """
    heads = fields.integer("num_attention_heads")
    return {
        "family": fields.text("model_type"),
        "vocab_size": fields.integer("vocab_size"),
        "embed_dim": fields.integer("hidden_size"),
        "num_layers": read_num_layers(fields),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", fields.integer("hidden_size") // max(heads, 1)),
        "mlp_dim": fields.integer("intermediate_size"),
        "norm": NormConfig(eps=fields.number("rms_norm_eps", 1e-6)),
        **read_token_ids(fields),
    }


def write_sizes(config: ModelConfig, *, implied_head_dim: bool = False) -> dict[str, Any]:
    """The inverse of `read_sizes`, with further fields that all families share.

    Args:
      config: the model.
      implied_head_dim: whether to omit head_dim if it equals hidden_size / heads, for families
        whose transformers class has no such field.
    """
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm.eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }
    if implied_head_dim and config.head_dim == config.embed_dim // config.num_heads:
        del sizes["head_dim"]
    return sizes
