"""Rotary embeddings in the configurations of Hugging Face and of llama.cpp."""

from collections.abc import Callable
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.families.fields import Fields
from tptt_jax.config import RopeConfig

_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}


def read_rope(scaling: Fields, theta: float, max_positions: int) -> RopeConfig:
    """Reads `rope_scaling` (published) or `rope_parameters` (transformers 5) of one layer kind.

    Args:
      scaling: the object; empty means an ordinary rotary embedding.
      theta: the base to use where the object has none of its own.
      max_positions: the context length to assume where "llama3" names none.

    Returns:
      Our description.

    Raises:
      ConversionError: for a type of scaling that is not implemented.
    """
    name = scaling.text("rope_type", scaling.text("type", "default"))
    if name not in _TYPES:
        raise ConversionError(
            f"rope type {name!r} in {scaling.origin} is not supported; known are "
            f"{', '.join(_TYPES)}."
        )
    scaling.require("partial_rotary_factor", (None, 1.0), None)
    settings: dict[str, Any] = {"theta": scaling.number("rope_theta", theta)}
    if name != "default":
        settings["factor"] = scaling.number("factor")
    if name == "llama3":
        settings |= {
            "low_freq_factor": scaling.number("low_freq_factor"),
            "high_freq_factor": scaling.number("high_freq_factor"),
            "original_max_positions": scaling.integer(
                "original_max_position_embeddings", max_positions
            ),
        }
    return RopeConfig(scaling=_TYPES[name], **settings)  # pyright: ignore[reportArgumentType]


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The transformers-5 form of one layer kind."""
    content: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling != "none":
        content |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        content |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return content


def write_old_rope(rope: RopeConfig) -> dict[str, Any]:
    """The published form, which transformers 4, vLLM and llama.cpp's converter read.

    Args:
      rope: the embedding of all layers, or of the full ones where layers differ.

    Returns:
      `rope_theta` and `rope_scaling`; the latter is null for an ordinary embedding.
    """
    scaling = write_rope(rope)
    theta = scaling.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope.scaling == "none" else scaling}


def read_flat_rope(fields: Fields, theta: float, max_positions: int) -> RopeConfig:
    """Reads the rotary embedding of a family whose layers all have the same.

    Args:
      fields: a config.json with `rope_parameters`, or with `rope_theta` and `rope_scaling`.
      theta: the family's default base.
      max_positions: its `max_position_embeddings`.

    Returns:
      Our description.

    Raises:
      ConversionError: for what is not implemented.
    """
    fields.require("partial_rotary_factor", (None, 1.0), None)
    key = "rope_scaling" if fields.raw.get("rope_parameters") is None else "rope_parameters"
    scaling = fields.object(key)
    nested = [name for name, value in scaling.raw.items() if isinstance(value, dict)]
    if nested:
        raise ConversionError(
            f"{scaling.origin} differs by layer ({', '.join(nested)}), which this family does not."
        )
    return read_rope(scaling, fields.number("rope_theta", theta), max_positions)


def read_gguf_rope(get: Callable[..., Any], theta: float) -> RopeConfig:
    """Reads the rotary embedding from the metadata of a GGUF file.

    Args:
      get: looks a metadata key up, with a default.
      theta: the base to use where the file has none.

    Returns:
      Our description.

    Raises:
      ConversionError: for a type of scaling that is not implemented.
    """
    base = shortest(get("rope.freq_base", theta))
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta=base)
    if kind != "linear":
        raise ConversionError(f"rope scaling {kind!r} of a GGUF file is not supported.")
    return RopeConfig(theta=base, scaling="linear", factor=shortest(get("rope.scaling.factor")))


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-6 as 9.99999997e-07."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def llama3_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """What "llama3" scaling divides each rotary frequency by.

    Args:
      rope: the embedding.
      head_dim: width of a head.

    Returns:
      Divisors [head_dim / 2], float64: 1 for short wavelengths, `factor` for long ones.
    """
    frequency = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope.original_max_positions * frequency / (2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def recognise_llama3(divisors: np.ndarray, theta: float, head_dim: int) -> RopeConfig:
    """Finds the "llama3" scaling that llama.cpp has written out as a tensor.

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
