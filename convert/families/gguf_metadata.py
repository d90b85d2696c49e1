"""Metadata of GGUF files that all architectures share."""

from collections.abc import Callable
from typing import Any

from convert.errors import ConversionError
from convert.families.rotary import GgufFactors, read_gguf_rope, shortest
from convert.formats import GgufFile
from tptt_jax.config import MAX_LAYERS, NormConfig

ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors of "longrope" scaling, which are part of the configuration."""


def metadata_reader(file: GgufFile) -> Callable[..., Any]:
    """Looks keys up under the file's architecture, e.g. "gemma3.block_count".

    Args:
      file: the file.

    Returns:
      A function of a key and, if the file may lack it, a default.
    """
    architecture = file.metadata.get("general.architecture")
    missing = object()

    def get(key: str, default: Any = missing) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if value is missing:
            raise ConversionError(
                f"{file.path} lacks the metadata key {architecture}.{key}: convert the model again."
            )
        return value

    return get


def read_gguf_sizes(file: GgufFile) -> dict[str, Any]:
    """The arguments of ModelConfig whose metadata keys are the same in every architecture.

    Args:
      file: the file.

    Returns:
      Keyword arguments of `ModelConfig`.

    Raises:
      ConversionError: if the file lacks a key or the embedding.
    """
    get = metadata_reader(file)
    if "token_embd.weight" not in file.tensors:
        raise ConversionError(f"{file.path} lacks the tensor token_embd.weight: convert it again.")
    heads = get("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ConversionError(
            f"{file.path} has different heads by layer, which is not supported: use another model."
        )
    layers = get("block_count")
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise ConversionError(
            f"{file.path} must have from 1 to {MAX_LAYERS} layers (block_count), it has "
            f"{layers!r:.99}."
        )
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "embed_dim": get("embedding_length"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": get("attention.key_length", get("embedding_length") // max(heads, 1)),
        "mlp_dim": get("feed_forward_length"),
        "tie_embeddings": "output.weight" not in file.tensors,
        "max_positions": get("context_length"),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": _end_tokens(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _end_tokens(file: GgufFile) -> tuple[int, ...]:
    """All end tokens: of a text, of a turn, and of a message to a tool."""
    found = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _rope_factors(file: GgufFile) -> GgufFactors | None:
    """The divisors of "longrope" for short and long texts, if the file has them."""
    if not all(name in file.tensors for name in ROPE_FACTORS):
        return None
    short, long = (file.read(name).reshape(-1) for name in ROPE_FACTORS)
    return short, long


def read_gguf_common(file: GgufFile) -> dict[str, Any]:
    """The sizes and further settings of an RMS-norm decoder with rotary embeddings.

    Args:
      file: the file.

    Returns:
      Keyword arguments of `ModelConfig`.

    Raises:
      ConversionError: if the file lacks a key, or rotates only part of each head.
    """
    get, sizes = metadata_reader(file), read_gguf_sizes(file)
    if get("rope.dimension_count", sizes["head_dim"]) != sizes["head_dim"]:
        raise ConversionError(
            f"{file.path} rotates only part of each head, which is not supported."
        )
    return {
        **sizes,
        "norm": NormConfig(eps=shortest(get("attention.layer_norm_rms_epsilon"))),
        "rope": read_gguf_rope(get, 10_000.0, _rope_factors(file)),
    }
