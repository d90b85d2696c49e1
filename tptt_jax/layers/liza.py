"""One attention layer: shared projections, softmax and memory, mixed by Memory as Gate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tptt_jax.array_typing import Array, Float, Hidden, Int, SegmentIds
from tptt_jax.config import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.layers.cache import MemoryState
from tptt_jax.layers.linear_attention import DeltaMemory
from tptt_jax.layers.lora import Projection
from tptt_jax.layers.norm import NormLayer, query_key_norm


class MagParam(nnx.Param):
    """The logit of the memory's share; it has a learning rate of its own."""


class Branches(NamedTuple):
    """Both branches before they are mixed, for a distillation loss.

    Attributes:
      softmax: [B, T, H, D], None in a purely linear model.
      linear: [B, T, H, D], unit RMS over all heads, None without a memory.
    """

    softmax: Float[Array, "B T H D"] | None
    linear: Float[Array, "B T H D"] | None


class LayerTokens(NamedTuple):
    """What an attention layer is told about the tokens of a call.

    Attributes:
      softmax: (q, k, v) -> (attended [B, T, H, D], rotated keys), as layers of this kind do it.
      segment_ids: [B, T], 0 = padding; None: one document per row, no padding.
      length: tokens of each row before this call [B]; None without a cache.
      share: the memory's share mu if it is scheduled, else None.
    """

    softmax: Callable[[Array, Array, Array], tuple[Array, Array]]
    segment_ids: SegmentIds | None = None
    length: Int[Array, "B"] | None = None
    share: Float[Array, ""] | None = None


class LizaOutput(NamedTuple):
    """What an attention layer gives.

    Attributes:
      out: [B, T, E].
      keys: rotated keys of these tokens, for a cache [B, T, K, D]; None without softmax.
      values: likewise.
      memory: what the memory carries on; None without a state or a memory.
      branches: softmax and memory before they were mixed.
    """

    out: Hidden
    keys: Float[Array, "B T K D"] | None
    values: Float[Array, "B T K D"] | None
    memory: MemoryState | None
    branches: Branches


class MemoryGate(nnx.Module):
    """mu = sigmoid(logit), one per head (TPTT's Memory as Gate, learned)."""

    def __init__(self, num_heads: int, init: float) -> None:
        """Creates the logits [H], float32, such that every share starts at `init`."""
        logit = jnp.log(init) - jnp.log1p(-init)
        self.logit = MagParam(jnp.full((num_heads,), logit, jnp.float32), axes=("heads",))

    def __call__(self) -> Float[Array, "H"]:
        """The share of the memory in each head."""
        return jax.nn.sigmoid(self.logit[...])


class LizaAttention(nnx.Module):
    """Attention of a pretrained layer, with a memory beside it if `liza` is given."""

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the projections, the q/k norms, and what the memory needs of its own."""
        self.liza = liza
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.qk_norm, self.clip_qkv = config.qk_norm, config.clip_qkv
        embed, width = config.embed_dim, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim

        def projection(
            name: str, size: tuple[int, int], axes: tuple[str, str], bias: bool
        ) -> Projection:
            path = f"self_attn.{name}"
            return Projection(
                *size, path=path, axes=axes, bias=bias, lora=lora, dtype=dtype, rngs=rngs
            )

        bias = config.attention_bias
        self.qkv_proj = self.q_proj = self.k_proj = self.v_proj = nnx.data(None)
        if config.fused_qkv:
            size = (embed, width + 2 * kv_width)
            self.qkv_proj = projection("qkv_proj", size, ("embed", "heads"), bias)
        else:
            self.q_proj = projection("q_proj", (embed, width), ("embed", "heads"), bias)
            self.k_proj = projection("k_proj", (embed, kv_width), ("embed", "kv_heads"), bias)
            self.v_proj = projection("v_proj", (embed, kv_width), ("embed", "kv_heads"), bias)
        out_bias = config.attention_out_bias
        self.o_proj = projection("o_proj", (width, embed), ("heads", "embed"), out_bias)
        self.q_norm = self.k_norm = nnx.data(None)
        if config.qk_norm is not None:
            self.q_norm = query_key_norm(config, config.num_heads, dtype)
            self.k_norm = query_key_norm(config, config.num_kv_heads, dtype)
        self.memory = self.mag = nnx.data(None)
        if liza is not None:
            sizes = (embed, config.num_heads, config.num_kv_heads, config.head_dim)
            self.memory = DeltaMemory(*sizes, liza, rngs=rngs)
            if liza.mag == "learned" and liza.softmax:
                self.mag = MemoryGate(config.num_heads, liza.mag_init)

    def __call__(
        self,
        x: Hidden,
        tokens: LayerTokens,
        *,
        memory_state: MemoryState | None = None,
        use_memory: bool = True,
        dropout_key: Array | None = None,
    ) -> LizaOutput:
        """Attends, remembers, mixes, projects.

        Args:
          x: [B, T, E], normalised.
          tokens: how softmax attention runs in this layer, segments, scheduled share.
          memory_state: what the memory carries; None attends within the rows alone.
          use_memory: False leaves the memory out: the base model's attention.
          dropout_key: turns dropout on.
        """
        q, k, v = self._project(x, dropout_key)
        soft = linear = rotated = values = None
        # The memory first: its loops then run beside attention's gradient on CPU, where XLA takes
        # what is ready in the order of the program.
        if self.memory is not None and use_memory:
            linear, memory_state = self.memory(
                *(x, q, k, v),
                segment_ids=tokens.segment_ids,
                state=memory_state,
                length=tokens.length,
                dropout_key=dropout_key,
            )
        if self.liza is None or self.liza.softmax:
            values = self._clip(v)
            soft_q, soft_k = self._normalize(q, self.q_norm), self._normalize(k, self.k_norm)
            soft, rotated = tokens.softmax(soft_q, soft_k, values)
        out = self._mix(soft, linear, tokens.share, dropout_key)
        return LizaOutput(out, rotated, values, memory_state, Branches(soft, linear))

    def _project(self, x: Array, key: Array | None) -> tuple[Array, ...]:
        """Raw queries [B, T, H, D], keys and values [B, T, K, D]."""
        if self.qkv_proj is not None:
            ends = (self.num_heads, self.num_heads + self.num_kv_heads)
            return tuple(jnp.split(self._heads(self.qkv_proj(x, key)), ends, axis=2))
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(self._heads(proj(x, key)) for proj in projections if proj is not None)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _normalize(self, x: Array, norm: NormLayer | None) -> Array:
        """Queries or keys as softmax attention takes them, before the rotary embedding."""
        if norm is not None:
            wide = x.reshape(*x.shape[:2], -1) if self.qk_norm == "full" else x
            x = norm(wide).reshape(x.shape)
        return self._clip(x)

    def _clip(self, x: Array) -> Array:
        return x if self.clip_qkv is None else jnp.clip(x, -self.clip_qkv, self.clip_qkv)

    def _mix(
        self, soft: Array | None, linear: Array | None, share: Array | None, key: Array | None
    ) -> Array:
        def project(x: Array, *, use_bias: bool = True) -> Array:
            return self.o_proj(x.reshape(*x.shape[:2], -1), key, use_bias=use_bias)

        if soft is None or linear is None:
            only = linear if soft is None else soft
            assert only is not None, "a purely linear model cannot run without its memory"
            return project(only)
        assert self.liza is not None
        mu = jnp.asarray(share if self.mag is None else self.mag()[:, None], soft.dtype)
        projected = self.liza.linear_scale == "projected"
        if not projected and not self.liza.cross_gate:
            match = self.liza.linear_scale == "match"
            return project(mix_heads(soft, linear, mu, match))
        if self.liza.linear_scale == "match":
            linear = match_rms(linear, soft)
        if self.liza.operator == "tptt_reference" and self.mag is None:
            return mix_projected(project(soft), project(linear), mu, self.liza)
        soft_term = project((1 - mu) * soft)
        # The bias belongs to the sum once; with one share for all heads this is the
        # reference's (1 - mu) P(soft) + mu P(linear).
        linear_term = project(mu * linear, use_bias=False)
        if projected:
            linear_term = linear_term * root_mean_square(project(soft))
        if self.liza.cross_gate:
            return soft_term + linear_term + soft_term * linear_term
        return soft_term + linear_term


def mix_heads(
    soft: Float[Array, "B T H D"], linear: Float[Array, "B T H D"], share: Array, match: bool
) -> Float[Array, "B T H D"]:
    """(1 - share) soft + share linear, the latter with the RMS of the former if `match`."""
    linear = match_rms(linear, soft) if match else linear
    return (1 - share) * soft + share * linear


def mix_projected(soft: Hidden, linear: Hidden, share: Array, liza: LizaConfig) -> Hidden:
    """How tptt 0.12.1 mixes: both branches with the output projection's bias [B, T, E]."""
    if liza.linear_scale == "projected":
        linear = linear * root_mean_square(soft)
    soft, linear = (1 - share) * soft, share * linear
    return soft + linear + soft * linear if liza.cross_gate else soft + linear


def root_mean_square(x: Hidden) -> Float[Array, "B T 1"]:
    """sqrt(mean(x^2) + 1e-5) over the last axis, in float32, then x's dtype."""
    wide = x.astype(jnp.float32)
    return jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5).astype(x.dtype)


def match_rms(
    linear: Float[Array, "B T H D"], soft: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Gives every head of `linear` the RMS that it has in `soft`, token by token."""
    wide = jnp.promote_types(soft.dtype, jnp.float32)

    def mean_square(x: Array) -> Array:
        return jnp.mean(jnp.square(x.astype(wide)), axis=-1, keepdims=True)

    # Unit RMS over all heads came before, so 1e-6 only guards heads that are silent.
    ratio = jnp.sqrt((mean_square(soft) + 1e-12) / (mean_square(linear) + 1e-6))
    return linear * ratio.astype(linear.dtype)
