"""The state of a layer between calls."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Bool, Float, Int
from tptt_jax.config import LayerKind, LizaConfig, ModelConfig
from tptt_jax.ops import tptt_reference


class TokenHistory(NamedTuple):
    """The last written tokens, right-aligned, that gates and virtual tokens still need.

    Attributes:
      keys: as the memory takes them, before anything else [B, h, K, D].
      values: likewise [B, h, K, D].
    """

    keys: Float[Array, "B h K D"]
    values: Float[Array, "B h K D"]


class MemoryState(NamedTuple):
    """The state of the linear-attention branch.

    Attributes:
      state: delta-product state [B, K, D, D], float32.
      history: raw tokens.
      queries: the last raw queries [B, h, H, D] where operator "tptt_reference" looks back at
        them, else None.
    """

    state: Float[Array, "B K D D"]
    history: TokenHistory
    queries: Float[Array, "B h H D"] | None = None


class KeyValueCache(NamedTuple):
    """The state of the softmax branch: a ring of S slots, and the sinks.

    Attributes:
      keys: rotated; the token at position p lies in slot p modulo S [B, S, K, D].
      values: [B, S, K, D].
      sink_keys: the document's first tokens [B, Z, K, D].
      sink_values: [B, Z, K, D].
    """

    keys: Float[Array, "B S K D"]
    values: Float[Array, "B S K D"]
    sink_keys: Float[Array, "B Z K D"]
    sink_values: Float[Array, "B Z K D"]


def softmax_window(config: ModelConfig, liza: LizaConfig | None, kind: LayerKind) -> int | None:
    """Tokens that a layer's softmax attention sees, None: all.

    Sliding layers of the base model were trained with their window and keep it, kept ones have
    none.
    """
    if kind == "sliding":
        return config.sliding_window
    return None if liza is None or kind == "kept" else liza.softmax_window


def num_sinks(config: ModelConfig, liza: LizaConfig | None, kind: LayerKind) -> int:
    """First tokens that stay visible in a windowed layer; only windows that Liza adds have them."""
    if kind == "sliding" or softmax_window(config, liza, kind) is None or liza is None:
        return 0
    return liza.softmax_sinks


def history_length(liza: LizaConfig) -> int:
    """Raw tokens before the current one that its gates and virtual tokens depend on."""
    rule = liza.recurrence
    if liza.operator == "tptt_reference":
        return tptt_reference.history_length(rule, liza.chunk_size)
    alpha, beta = (
        2 if gate in ("k", "v", "kv") else 0 for gate in (rule.alpha_gate, rule.beta_gate)
    )
    tokens = 0 if rule.trick == "rotary" else rule.num_householder - 1
    # An expanded write gate is differenced over gates that look back themselves.
    return max(alpha, tokens, beta + tokens if liza.expand_gates else beta)


def init_memory_state(
    liza: LizaConfig,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> MemoryState:
    """The memory before the first token; the history has the model's `dtype`."""
    size = (batch, history_length(liza))
    raw = jnp.zeros((*size, num_kv_heads, head_dim), dtype)
    state = jnp.zeros((batch, num_kv_heads, head_dim, head_dim), jnp.float32)
    if liza.operator == "tptt_reference":
        queries = jnp.zeros((*size, num_heads, head_dim), dtype)
        state = jnp.full_like(state, tptt_reference.INITIAL_STATE)
        return MemoryState(state, TokenHistory(raw, raw), queries)
    return MemoryState(state, TokenHistory(raw, raw))


def init_key_value_cache(
    config: ModelConfig,
    liza: LizaConfig | None,
    kind: LayerKind,
    *,
    batch: int,
    max_tokens: int,
    dtype: DTypeLike,
) -> KeyValueCache:
    """The empty cache of one layer.

    Args:
      config: sizes.
      liza: None for the plain base model.
      kind: of the layer.
      batch: rows.
      max_tokens: longest context that a layer without a window must hold.
      dtype: of keys and values.
    """
    window = softmax_window(config, liza, kind)
    slots = max_tokens if window is None else window
    sinks = num_sinks(config, liza, kind)
    ring = jnp.zeros((batch, slots, config.num_kv_heads, config.head_dim), dtype)
    first = jnp.zeros((batch, sinks, config.num_kv_heads, config.head_dim), dtype)
    return KeyValueCache(ring, ring, first, first)


def slot_positions(length: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
    """Position of the token in every ring slot after `length` tokens; negative: empty."""
    newest = length[:, None] - 1
    return newest - jnp.mod(newest - jnp.arange(slots), slots)


def write_ring(
    ring: Float[Array, "B S K D"],
    new: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    length: Int[Array, "B"],
) -> Float[Array, "B S K D"]:
    """Puts every valid token into slot position modulo S; only the last S are kept.

    Args:
      ring: before [B, S, K, D].
      new: tokens of this call [B, T, K, D].
      positions: theirs [B, T].
      valid: False for padding, which is not written.
      length: tokens of each row after this call [B].
    """
    slots = ring.shape[1]
    kept = valid & (positions >= length[:, None] - slots)
    slot = jnp.where(kept, positions % max(slots, 1), slots)
    rows = jnp.arange(ring.shape[0])[:, None]
    return ring.at[rows, slot].set(new.astype(ring.dtype), mode="drop")


def write_sinks(
    sinks: Float[Array, "B Z K D"],
    new: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "B Z K D"]:
    """Keeps the tokens at positions below Z."""
    slot = jnp.where(valid, positions, sinks.shape[1])
    rows = jnp.arange(sinks.shape[0])[:, None]
    return sinks.at[rows, slot].set(new.astype(sinks.dtype), mode="drop")


def extend_history(
    history: Float[Array, "B h K D"], new: Float[Array, "B T K D"], valid: Bool[Array, "B T"]
) -> Float[Array, "B h K D"]:
    """The last h valid tokens of history and new tokens together, right-aligned."""
    size = history.shape[1]
    seen = jnp.concatenate([history, new.astype(history.dtype)], axis=1)
    ones = jnp.ones((valid.shape[0], size), bool)
    counts = jnp.concatenate([ones, valid], axis=1)
    from_end = jnp.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    distances = jnp.arange(size, 0, -1)[None, :, None]
    picked = (counts[:, None] & (from_end[:, None] == distances)).astype(history.dtype)
    return jnp.einsum("bht,bt...->bh...", picked, seen, precision="highest")
