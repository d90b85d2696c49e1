"""One attention layer: shared projections, softmax and memory, mixed by Memory as Gate."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float, Hidden, Int
from tptt_jax.config import LayerKind, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.layers.cache import KeyValueCache, MemoryState
from tptt_jax.layers.eviction import Evicted, evict
from tptt_jax.layers.gates import MassGate, MemoryGate
from tptt_jax.layers.lora import Projection
from tptt_jax.layers.memory import DeltaMemory, MemoryTokens
from tptt_jax.layers.mixing import match_rms, mix_heads, mix_projected, root_mean_square
from tptt_jax.layers.norm import NormLayer, query_key_norm
from tptt_jax.layers.parameters import JoinedHeads
from tptt_jax.layers.softmax_attention import (
    TokenContext,
    apply_softmax,
    softmax_settings,
)
from tptt_jax.ops.attention import Attended
from tptt_jax.ops.placement import constrain


class Branches(NamedTuple):
    """Both branches before they are mixed, for a distillation loss.

    Attributes:
      softmax: [B, T, H, D], None in a purely linear model.
      linear: [B, T, H, D], None without a memory; zero in layers that have none.
    """

    softmax: Float[Array, "B T H D"] | None
    linear: Float[Array, "B T H D"] | None


class LayerTokens(NamedTuple):
    """Per-call information about tokens that an attention layer needs.

    Attributes:
      contexts: of the tokens, for layers of each kind.
      kinds: the kinds that this layer may be of.
      kind: which of them it is; None: there is only one.
      caches: softmax caches with a leading axis over the layers of each kind; None without a cache.
      rank: this layer's index on that axis.
      share: the memory's share mu if it is scheduled, else None.
    """

    contexts: dict[LayerKind, TokenContext]
    kinds: tuple[LayerKind, ...]
    kind: Int[Array, ""] | None = None
    caches: dict[LayerKind, KeyValueCache] | None = None
    rank: Int[Array, ""] | int = 0
    share: Float[Array, ""] | None = None

    @property
    def any_context(self) -> TokenContext:
        """For what does not depend on the kind: segments and lengths."""
        return self.contexts[self.kinds[0]]

    def cache_of(self, kind: LayerKind) -> KeyValueCache | None:
        """This layer's softmax cache, if it is of this kind."""
        if self.caches is None:
            return None
        return KeyValueCache(*(x[self.rank] for x in self.caches[kind]))


class LizaOutput(NamedTuple):
    """The result of an attention layer.

    Attributes:
      out: [B, T, E].
      keys: rotated keys of these tokens, for a cache [B, T, K, D]; None without softmax.
      values: likewise.
      memory: the new memory state; None without a state or a memory.
      branches: softmax and memory before they were mixed.
    """

    out: Hidden
    keys: Float[Array, "B T K D"] | None
    values: Float[Array, "B T K D"] | None
    memory: MemoryState | None
    branches: Branches


class Projected(NamedTuple):
    """Outputs of a layer's projections.

    Attributes:
      x: the input [B, T, E].
      q: raw queries [B, T, H, D].
      k: raw keys [B, T, K, D].
      v: raw values [B, T, K, D].
      soft_q: queries as softmax attention takes them, before the rotary embedding.
      soft_k: keys likewise.
      soft_v: values likewise.
    """

    x: Hidden
    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    soft_q: Float[Array, "B T H D"]
    soft_k: Float[Array, "B T K D"]
    soft_v: Float[Array, "B T K D"]


class _Mixed(NamedTuple):
    """One kind of layer's attention with a memory of evicted tokens."""

    out: Array  # [B, T, H, D]
    keys: Array
    memory: MemoryState | None
    branches: Branches


class LizaAttention(nnx.Module):
    """Attention of a pretrained layer, with a memory beside it if `liza` is given."""

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        *,
        with_memory: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the projections, the q/k norms, and the memory's own parameters.

        `with_memory` is False in layers without a memory although `liza` is given.
        """
        self.config, self.liza = config, liza
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        embed, width = config.embed_dim, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim

        def projection(
            name: str, size: tuple[int, int], axes: tuple[str, str], bias: bool
        ) -> Projection:
            path = f"self_attn.{name}"
            return Projection(
                *size, path=path, axes=axes, bias=bias, lora=lora, dtype=dtype, rngs=rngs
            )

        bias, heads = config.attention.bias, JoinedHeads("heads", self.num_heads)
        self.qkv_proj = self.q_proj = self.k_proj = self.v_proj = nnx.data(None)
        if config.attention.fused_qkv:
            size = (embed, width + 2 * kv_width)
            every = JoinedHeads("heads", self.num_heads + 2 * self.num_kv_heads)
            self.qkv_proj = projection("qkv_proj", size, ("embed", every), bias)
        else:
            kv_heads = JoinedHeads("kv_heads", self.num_kv_heads)
            self.q_proj = projection("q_proj", (embed, width), ("embed", heads), bias)
            self.k_proj = projection("k_proj", (embed, kv_width), ("embed", kv_heads), bias)
            self.v_proj = projection("v_proj", (embed, kv_width), ("embed", kv_heads), bias)
        out_bias = config.attention.out_bias
        self.o_proj = projection("o_proj", (width, embed), (heads, "embed"), out_bias)
        self.q_norm = self.k_norm = nnx.data(None)
        if config.attention.qk_norm is not None:
            self.q_norm = query_key_norm(config, config.num_heads, dtype)
            self.k_norm = query_key_norm(config, config.num_kv_heads, dtype)
        self.memory = self.mag = nnx.data(None)
        if liza is not None and with_memory and liza.writes != "none":
            sizes = (embed, config.num_heads, config.num_kv_heads, config.head_dim)
            self.memory = DeltaMemory(*sizes, liza, rngs=rngs)
            if liza.mag == "mass":
                self.mag = MassGate(config.num_heads, config.head_dim)
            elif liza.mag == "learned" and liza.softmax:
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
        """Runs attention and the memory, mixes both, and projects the result.

        Args:
          x: [B, T, E], normalised.
          tokens: positions, caches and the scheduled share.
          memory_state: state of the memory; None attends within the rows only.
          use_memory: False leaves the memory out: the base model's attention.
          dropout_key: turns dropout on.
        """
        made = self.project(x, dropout_key)
        if self.memory is None or self.liza is None or not use_memory:
            return self._run_beside(made, tokens, memory_state, False, dropout_key)
        if self.liza.writes == "all":
            return self._run_beside_kinds(made, tokens, memory_state, dropout_key)
        mixed = self._run_evicted(made, tokens, memory_state, dropout_key)
        return LizaOutput(
            self.project_out(mixed.out, dropout_key),
            mixed.keys,
            made.soft_v,
            mixed.memory,
            mixed.branches,
        )

    def _run_beside_kinds(
        self,
        made: Projected,
        tokens: LayerTokens,
        memory_state: MemoryState | None,
        dropout_key: Array | None,
    ) -> LizaOutput:
        """`_run_beside`, where some layers are kept as they were, without a memory."""
        if "kept" not in tokens.kinds:
            return self._run_beside(made, tokens, memory_state, True, dropout_key)

        def run(kind: LayerKind, made: Projected, state: MemoryState | None) -> LizaOutput:
            mine = tokens._replace(kinds=(kind,), kind=None)
            output = self._run_beside(made, mine, state, kind != "kept", dropout_key)
            soft, linear = output.branches
            if linear is None:
                output = output._replace(branches=Branches(soft, jnp.zeros_like(made.q)))
            return output

        options = [functools.partial(run, kind) for kind in tokens.kinds]
        return _switch(tokens.kind, options, made, memory_state)

    def _run_beside(
        self,
        made: Projected,
        tokens: LayerTokens,
        memory_state: MemoryState | None,
        runs_memory: bool,
        dropout_key: Array | None,
    ) -> LizaOutput:
        """Softmax attention, and a memory of all tokens beside it."""
        soft = linear = keys = values = None
        # The memory first: its loops then run in parallel with attention's gradient on CPU, where
        # XLA schedules ready operations in program order.
        if self.memory is not None and runs_memory:
            written = MemoryTokens(made.k, made.v, tokens.any_context.segment_ids)
            linear, memory_state = self.memory(
                made.x,
                made.q,
                written,
                state=memory_state,
                length=tokens.any_context.length,
                dropout_key=dropout_key,
            )
        if self.liza is None or self.liza.softmax:
            options = [functools.partial(self._attend, kind, tokens) for kind in tokens.kinds]
            soft, keys = _switch(tokens.kind, options, made)
            values = made.soft_v
        out = self._mix(soft, linear, tokens.share, dropout_key)
        return LizaOutput(out, keys, values, memory_state, Branches(soft, linear))

    def _attend(self, kind: LayerKind, tokens: LayerTokens, made: Projected) -> tuple[Array, Array]:
        """Softmax attention [B, T, H, D] and rotated keys."""
        attended, keys = self._softmax(kind, tokens, made)
        return attended.out, keys

    def _softmax(
        self, kind: LayerKind, tokens: LayerTokens, made: Projected
    ) -> tuple[Attended, Array]:
        settings = softmax_settings(self.config, self.liza, kind)
        qkv = (made.soft_q, made.soft_k, made.soft_v)
        return apply_softmax(settings, tokens.contexts[kind], *qkv, tokens.cache_of(kind))

    def _run_evicted(
        self,
        made: Projected,
        tokens: LayerTokens,
        memory_state: MemoryState | None,
        dropout_key: Array | None,
    ) -> _Mixed:
        """Softmax attention with a window, and a memory of evicted tokens."""

        def run(kind: LayerKind, made: Projected, state: MemoryState | None) -> _Mixed:
            return self._mix_evicted(kind, tokens, made, state, dropout_key)

        options = [functools.partial(run, kind) for kind in tokens.kinds]
        return _switch(tokens.kind, options, made, memory_state)

    def _mix_evicted(
        self,
        kind: LayerKind,
        tokens: LayerTokens,
        made: Projected,
        state: MemoryState | None,
        dropout_key: Array | None,
    ) -> _Mixed:
        assert self.liza is not None
        assert self.memory is not None
        settings, context = softmax_settings(self.config, self.liza, kind), tokens.contexts[kind]
        is_idle = not self.liza.runs_memory(kind) or context.never_evicts(settings.window)
        if is_idle:
            attended, keys = self._softmax(kind, tokens, made)
            branches = Branches(attended.out, jnp.zeros_like(attended.out))
            return _Mixed(attended.out, keys, state, branches)
        cache = tokens.cache_of(kind)
        lost = evict(settings, context, made.soft_k, made.soft_v, cache)
        # Before attention, as in `_run_beside`.
        linear, state = self.read_evicted(made, lost, state, dropout_key)
        attended, keys = self._softmax(kind, tokens, made)
        mixed = self.mix_evicted(made, attended, linear, lost, tokens.share)
        return _Mixed(mixed, keys, state, Branches(attended.out, linear))

    def read_evicted(
        self,
        made: Projected,
        lost: Evicted,
        state: MemoryState | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T H D"], MemoryState | None]:
        """Writes evicted tokens into the memory, and reads it at each place."""
        assert self.memory is not None
        # Before the first place with a token to write there is nothing to read.
        inputs = jax.tree.map(lambda x: x[:, lost.first :], (made.x, made.soft_q, lost.tokens))
        linear, state = self.memory(
            *inputs, state=state, length=lost.before, dropout_key=dropout_key
        )
        return jnp.pad(linear, ((0, 0), (lost.first, 0), (0, 0), (0, 0))), state

    def mix_evicted(
        self,
        made: Projected,
        attended: Attended,
        linear: Float[Array, "B T H D"],
        lost: Evicted,
        scheduled: Float[Array, ""] | None = None,
    ) -> Float[Array, "B T H D"]:
        """o_in + share (o_memory - o_in); the share is 0 while the memory is empty."""
        assert self.liza is not None
        if self.liza.linear_scale == "match":
            linear = match_rms(linear, attended.out)
        share = self.evicted_share(made, attended, lost, scheduled)
        return attended.out + share.astype(linear.dtype) * (linear - attended.out)

    def evicted_share(
        self,
        made: Projected,
        attended: Attended,
        lost: Evicted,
        scheduled: Float[Array, ""] | None = None,
    ) -> Float[Array, "B T #H 1"]:
        """The share of a memory of evicted tokens at each place, 0 while it is empty."""
        if isinstance(self.mag, MassGate):
            assert attended.log_mass is not None
            return self.mag(made.soft_q, attended.log_mass, lost.held)
        share = jnp.asarray(scheduled if self.mag is None else self.mag()[:, None])
        return jnp.where(lost.held[..., None, None] > 0, share, 0)

    def project(self, x: Hidden, key: Array | None = None) -> Projected:
        """Queries, keys and values [B, T, heads, D] of an input [B, T, E]."""
        q, k, v = self._project(x, key)
        q = constrain(q, "rows", "tokens", "heads", None)
        k, v = (constrain(y, "rows", "tokens", "kv_heads", None) for y in (k, v))
        if self.liza is not None and not self.liza.softmax:
            return Projected(x, q, k, v, q, k, v)
        soft_q, soft_k = self._normalize(q, self.q_norm), self._normalize(k, self.k_norm)
        return Projected(x, q, k, v, soft_q, soft_k, self._clip(v))

    def project_out(
        self, x: Float[Array, "B T H D"], key: Array | None = None, *, use_bias: bool = True
    ) -> Hidden:
        """Heads [B, T, H, D] to the residual stream [B, T, E]."""
        x = constrain(x, "rows", "tokens", "heads", None)
        return self.o_proj(x.reshape(*x.shape[:2], -1), key, use_bias=use_bias)

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
            wide = x.reshape(*x.shape[:2], -1) if self.config.attention.qk_norm == "full" else x
            x = norm(wide).reshape(x.shape)
        return self._clip(x)

    def _clip(self, x: Array) -> Array:
        most = self.config.attention.clip_qkv
        return x if most is None else jnp.clip(x, -most, most)

    def _mix(
        self, soft: Array | None, linear: Array | None, share: Array | None, key: Array | None
    ) -> Array:
        project = functools.partial(self.project_out, key=key)
        if soft is None or linear is None:
            only = linear if soft is None else soft
            assert only is not None, "a purely linear model cannot run without its memory"
            return project(only)
        assert self.liza is not None
        assert not isinstance(self.mag, MassGate)
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


def _switch(kind: Array | None, options: list, *operands: Any) -> Any:
    """Runs the option of this number, or the only one."""
    if kind is None or len(options) == 1:
        return options[0](*operands)
    return lax.switch(kind, options, *operands)
