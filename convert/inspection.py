"""Describes a model, and the memory that a Titan of it needs, without reading weights."""

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from convert.adapters import describe_adapter, is_adapter, open_adapter
from convert.sources import Pretrained, Source, find_checkpoint, locate, open_pretrained
from convert.tptt import describe_tptt, is_tptt, open_tptt
from tptt_jax import CausalLM, DecodingState, LizaConfig, ModelConfig, init_cache

_SIZES = (
    *("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    *("vocab_size", "max_positions", "tie_embeddings"),
)


# Longer than any window: a layer that holds fewer tokens has a fixed size.
_ANY_CONTEXT = 1 << 30


def describe(source: Source, contexts: Sequence[int], window: int) -> dict[str, Any]:
    """Describes a model from its configuration and the headers of its weights.

    Args:
      source: what `load_pretrained` takes.
      contexts: lengths in tokens for which to report the whole state.
      window: of the windowed Titan, in tokens.

    Returns:
      Family, sizes, dtypes, and under "layer_state" and "state" what each variant of the model
      carries for one row of a batch; a checkpoint of our own adds its own variant. For a PEFT or
      tptt directory, which has no state, its settings.

    Raises:
      ConversionError: if the source cannot be read.
      ValueError: if a length is not positive.
    """
    if not contexts or min(contexts) < 1:
        raise ValueError(f"context must be lengths of at least 1 token, got {list(contexts)}.")
    variants: dict[str, LizaConfig | None] = {
        "base": None,
        f"Titan, window {window}": LizaConfig(softmax_window=window),
    }
    report: dict[str, Any] = {}
    while described := find_checkpoint(source):
        if not report:
            report = {
                "checkpoint": str(source),
                "liza": described.liza is not None,
                "lora": described.lora is not None,
            }
            variants["this checkpoint"] = described.liza
        source = described.source
    path = locate(source)
    if is_tptt(path):
        return report | describe_tptt(open_tptt(path))
    if is_adapter(path):
        return report | describe_adapter(open_adapter(path))
    opened = open_pretrained(path)
    dtype = opened.stored_dtype
    report |= _describe_weights(opened) | {"dtype": dtype.name, "layer_state": []}
    report["state"] = []
    for name, liza in variants.items():
        states = _State(opened.config, liza, dtype)
        report["layer_state"] += [{"model": name, **row} for row in states.layer_rows()]
        report["state"] += [
            {"model": name, "tokens": context, "bytes": states.nbytes(context)}
            for context in contexts
        ]
    return report


def _describe_weights(opened: Pretrained) -> dict[str, Any]:
    infos = opened.tensors.tensors.values()
    return {
        "source": str(opened.path),
        "family": opened.family.model_type,
        "parameters": sum(prod(info.shape) for info in infos),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype for info in infos)),
        **{name: getattr(opened.config, name) for name in _SIZES},
    }


class _State:
    """The state of a model between calls for one row of a batch; nothing is allocated."""

    def __init__(self, config: ModelConfig, liza: LizaConfig | None, dtype: DTypeLike):
        self.config, self.liza = config, liza
        # Sizes do not depend on the length for which rotary frequencies are fixed.
        config = config.at_length(0)
        self.model = nnx.eval_shape(lambda: CausalLM(config, liza, dtype=dtype, rngs=nnx.Rngs(0)))

    def cache(self, context: int) -> DecodingState:
        return jax.eval_shape(lambda: init_cache(self.model, 1, context))

    def nbytes(self, context: int) -> int:
        state = self.cache(context)
        return _nbytes((state.stacks, state.length))

    def layer_rows(self) -> list[dict[str, Any]]:
        """The state of one layer: a row for each group of equal layers."""
        counts: Counter[tuple[str, int, int | None, int]] = Counter()
        for stack in self.cache(_ANY_CONTEXT).stacks:
            memory = 0 if stack.memory is None else _nbytes_per_layer(stack.memory)
            if stack.softmax is None:
                assert stack.memory is not None
                counts["linear", 0, 0, memory] += stack.memory.state.shape[0]
                continue
            for kind, cache in stack.softmax.items():
                layers, _, slots = cache.keys.shape[:3]
                slot = _nbytes_per_layer((cache.keys, cache.values)) // slots
                most = None if slots == _ANY_CONTEXT else _nbytes_per_layer(cache)
                runs = self.liza is not None and self.liza.runs_memory(kind)
                counts[kind, slot, most, memory if runs else 0] += layers
        names = ("kind", "kv_bytes_per_token", "kv_bytes_at_most", "memory_bytes")
        return [
            dict(zip(names, row, strict=True)) | {"layers": layers}
            for row, layers in counts.items()
        ]


def _nbytes(tree: Any) -> int:
    return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _nbytes_per_layer(tree: Any) -> int:
    return sum(prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
