"""Rotary embeddings in configurations of Hugging Face and llama.cpp."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.families.fields import Fields
from tptt_jax.config import RopeConfig, RopeScaling
from tptt_jax.ops.attention.rope import rotary_frequencies

GgufFactors = tuple[np.ndarray, np.ndarray]

_TYPES: dict[str, RopeScaling] = {
    **{"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"},
    **{"dynamic": "dynamic", "longrope": "longrope"},
}


def read_rope(
    scaling: Fields, theta: float, max_positions: int, original: int | None = None
) -> RopeConfig:
    """Reads `rope_scaling` (published) or `rope_parameters` (transformers 5) of one layer kind.

    Args:
      scaling: the object; empty means an ordinary rotary embedding.
      theta: the base if the object has none.
      max_positions: the model's `max_position_embeddings`.
      original: the context length before stretching, if it stands beside the object and not in
        it; it takes precedence over the object's, as in transformers.

    Returns:
      Our description.

    Raises:
      ConversionError: for a type of scaling that is not implemented.
    """
    name = scaling.text("rope_type", scaling.text("type", "default"))
    if name not in _TYPES:
        raise ConversionError(
            f"rope type {name!r} in {scaling.origin} is not supported; supported: "
            f"{', '.join(_TYPES)}."
        )
    scaling.require("partial_rotary_factor", (None, 1.0), None)
    settings: dict[str, Any] = {"theta": scaling.number("rope_theta", theta)}
    if name in ("linear", "llama3", "dynamic"):
        settings["factor"] = scaling.number("factor")
    if name == "dynamic":
        settings["original_max_positions"] = max_positions
    if name in ("llama3", "yarn", "longrope"):
        if original is None:
            original = scaling.integer("original_max_position_embeddings", max_positions)
        settings["original_max_positions"] = original
    if name == "llama3":
        settings |= {
            "low_freq_factor": scaling.number("low_freq_factor"),
            "high_freq_factor": scaling.number("high_freq_factor"),
        }
    if name in ("yarn", "longrope"):
        # As in transformers: the factor of "yarn" may be null, but not missing.
        implied = (
            {}
            if name == "yarn" and "factor" not in scaling.raw
            else {"default": max_positions / max(original or 1, 1)}
        )
        settings |= {
            "factor": scaling.number("factor", **implied),
            "attention_factor": scaling.number("attention_factor", None),
        }
    if name == "yarn":
        settings |= {
            # transformers replaces 0 by the default, too.
            "beta_fast": scaling.number("beta_fast", None) or 32.0,
            "beta_slow": scaling.number("beta_slow", None) or 1.0,
            "mscale": scaling.number("mscale", None),
            "mscale_all_dim": scaling.number("mscale_all_dim", None),
            "truncate": scaling.boolean("truncate", True),
        }
    if name == "longrope":
        settings |= {key: scaling.numbers(key) for key in ("short_factor", "long_factor")}
    return RopeConfig(scaling=_TYPES[name], **settings)


# Optional settings with the same name in transformers.
_OPTIONAL = {
    "yarn": (
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("attention_factor",),
}


def write_rope(rope: RopeConfig, max_positions: int) -> dict[str, Any]:
    """The transformers-5 form of one layer kind; `max_positions` are the model's.

    Raises:
      ConversionError: if "dynamic" scaling begins at another length, which no file can express.
    """
    if rope.scaling == "dynamic" and rope.original_max_positions != max_positions:
        raise ConversionError(
            f'"dynamic" rotary scaling must begin at the model\'s {max_positions} positions to be '
            f"written, it begins at {rope.original_max_positions}: set original_max_positions to "
            "that, or fix the frequencies, with --context TOKENS or tptt_jax.fix_context(model, "
            "tokens)."
        )
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    content: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    # Published long models omit the factor if it is the ratio of both lengths.
    if rope.scaling != "longrope" or rope.factor != max_positions / rope.original_max_positions:
        content["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn", "longrope"):
        content["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        content |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.scaling == "longrope":
        content |= {key: list(getattr(rope, key)) for key in ("short_factor", "long_factor")}
    plain = RopeConfig()
    for key in _OPTIONAL.get(rope.scaling, ()):
        if getattr(rope, key) != getattr(plain, key):
            content[key] = getattr(rope, key)
    return content


def write_old_rope(rope: RopeConfig, max_positions: int) -> dict[str, Any]:
    """The published form, which transformers 4, vLLM and llama.cpp's converter read.

    Args:
      rope: the embedding of all layers, or of the full ones where layers differ.
      max_positions: the model's `max_position_embeddings`.

    Returns:
      `rope_theta` and `rope_scaling`; the latter is null for an ordinary embedding.
    """
    scaling = write_rope(rope, max_positions)
    theta = scaling.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope.scaling == "none" else scaling}


def read_flat_rope(fields: Fields, theta: float, max_positions: int) -> RopeConfig:
    """Reads the rotary embedding of a family with equal layers.

    Args:
      fields: a config.json with `rope_parameters`, or with `rope_theta` and `rope_scaling`.
      theta: the family's default base.
      max_positions: its `max_position_embeddings`.

    Returns:
      Our description.

    Raises:
      ConversionError: for unsupported settings.
    """
    fields.require("partial_rotary_factor", (None, 1.0), None)
    key = "rope_scaling" if fields.raw.get("rope_parameters") is None else "rope_parameters"
    scaling = fields.object(key)
    nested = [name for name, value in scaling.raw.items() if isinstance(value, dict)]
    if nested:
        raise ConversionError(
            f"{scaling.origin} differs by layer ({', '.join(nested)}), which this family does not."
        )
    original = fields.integer("original_max_position_embeddings", None)
    return read_rope(scaling, fields.number("rope_theta", theta), max_positions, original)


def read_gguf_rope(
    get: Callable[..., Any], theta: float, factors: GgufFactors | None = None
) -> RopeConfig:
    """Reads the rotary embedding from the metadata of a GGUF file, as llama.cpp does.

    Args:
      get: looks up a metadata key, with a default.
      theta: the base if the file has none.
      factors: the tensors rope_factors_short.weight and rope_factors_long.weight of "longrope";
        None: there are none.

    Returns:
      Our description.

    Raises:
      ConversionError: for a type of scaling that is not implemented.
    """
    base = shortest(get("rope.freq_base", theta))
    kind = get("rope.scaling.type", "linear")
    factor = shortest(get("rope.scaling.factor", get("rope.scale_linear", 1.0)) or 1.0)
    if kind == "none" or (kind == "linear" and factor == 1):
        return RopeConfig(theta=base)
    if kind == "linear":
        return RopeConfig(theta=base, scaling="linear", factor=factor)
    longest = get("context_length")
    original = get("rope.scaling.original_context_length", longest)
    scale = shortest(get("rope.scaling.attn_factor", 1.0))
    if kind == "yarn":
        return _read_gguf_yarn(get, base, factor, original, scale)
    if kind == "longrope" and factors is not None:
        short, long = (tuple(map(shortest, each)) for each in factors)
        return RopeConfig(
            theta=base,
            scaling="longrope",
            factor=longest / original,
            original_max_positions=original,
            attention_factor=scale,
            short_factor=short,
            long_factor=long,
        )
    raise ConversionError(
        f"rope scaling {kind!r} of a GGUF file is not supported here: use the Hugging Face "
        "checkpoint of the model."
    )


def _read_gguf_yarn(
    get: Callable[..., Any], theta: float, factor: float, original: int, scale: float
) -> RopeConfig:
    """Reads "yarn" scaling; `scale` multiplies the recommended attention factor."""
    for key, plain in (("yarn_ext_factor", (1.0, -1.0)), ("yarn_log_multiplier", (0.0,))):
        value = get(f"rope.scaling.{key}", plain[0])
        if value not in plain:
            raise ConversionError(
                f"rope.scaling.{key} = {value!r:.99} of a GGUF file is not supported; it must be "
                f"{plain[0]}."
            )
    rope = RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=shortest(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=shortest(get("rope.scaling.yarn_beta_slow", 1.0)),
    )
    # llama.cpp's converter writes transformers' attention_factor as this.
    given = get("rope.scaling.yarn_attn_factor", None)
    if given is None and scale == 1:
        return rope
    total = rope.attention_scale if given is None else shortest(given)
    return dataclasses.replace(rope, attention_factor=total * scale)


def shortest(value: float) -> float:
    """The shortest decimal of the same float32: GGUF stores 1e-6 as 9.99999997e-07."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def llama3_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """The divisor of each rotary frequency under "llama3" scaling.

    Args:
      rope: the embedding.
      head_dim: width of a head.

    Returns:
      Divisors [head_dim / 2], float64: 1 for short wavelengths, `factor` for long ones.
    """
    plain = RopeConfig(theta=rope.theta)
    return rotary_frequencies(plain, head_dim) / rotary_frequencies(rope, head_dim)


def recognise_llama3(divisors: np.ndarray, theta: float, head_dim: int) -> RopeConfig:
    """Recovers the "llama3" scaling from the divisors that llama.cpp stores as a tensor.

    Args:
      divisors: the tensor rope_freqs.weight [head_dim / 2].
      theta: base of the rotary embedding.
      head_dim: width of a head.

    Returns:
      The embedding; its low and high factors are Llama 3's 1 and 4.

    Raises:
      ConversionError: if no original context length explains the divisors.
    """
    if divisors.shape == (head_dim // 2,):
        for exponent in range(9, 18):
            candidate = RopeConfig(
                theta=theta,
                scaling="llama3",
                factor=shortest(divisors.max()),
                original_max_positions=2**exponent,
            )
            if np.allclose(llama3_divisors(candidate, head_dim), divisors, rtol=1e-4):
                return candidate
    raise ConversionError(
        "rope_freqs.weight of the GGUF file is not Llama 3's rotary scaling; use the Hugging Face "
        "checkpoint of the model."
    )
