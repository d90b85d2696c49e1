"""The linear-attention memory: gates, virtual tokens, DeltaProduct, normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from tptt_jax.array_typing import Array, Bool, Float, Hidden, Int, SegmentIds
from tptt_jax.config import LizaConfig
from tptt_jax.layers.cache import (
    MemoryState,
    TokenHistory,
    extend_history,
    history_length,
    init_memory_state,
)
from tptt_jax.layers.lora import LowRank, Projection, path_number
from tptt_jax.layers.norm import rms_normalize
from tptt_jax.ops.delta_product import chunk_delta_product, step_delta_product
from tptt_jax.ops.gates import compute_beta, compute_log_decay
from tptt_jax.ops.naive_delta_product import naive_delta_product
from tptt_jax.ops.residuals import save_mixed
from tptt_jax.ops.tptt_reference import (
    RawTokens,
    attend_tptt_reference,
    extend_tptt_reference,
)
from tptt_jax.ops.virtual_tokens import expand_virtual_tokens


class DeltaMemory(nnx.Module):
    """The memory on projections that somebody else made (TPTT section 3.2).

    Raw q, k, v go in, from before any rotary embedding or q/k norm; what comes out
    has unit RMS over all heads and no projection after it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: LizaConfig,
        *,
        bidirectional: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the memory's own low-rank deltas if `config.memory_rank` asks for them.

        `bidirectional` is for operator "tptt_reference", which turns virtual tokens around and not
        tokens; with the others two passes over the tokens do it.
        """
        self.config = config
        self.bidirectional = bidirectional
        self.q_delta: LowRank | None = nnx.data(None)
        self.k_delta: LowRank | None = nnx.data(None)
        self.v_delta: LowRank | None = nnx.data(None)
        if config.memory_rank:

            def delta(heads: int, axis: str) -> LowRank:
                return LowRank(
                    embed_dim,
                    heads * head_dim,
                    rank=config.memory_rank,
                    scale=config.memory_alpha / config.memory_rank,
                    axes=("embed", axis),
                    rngs=rngs,
                )

            self.q_delta = delta(num_heads, "heads")
            self.k_delta = delta(num_kv_heads, "kv_heads")
            self.v_delta = delta(num_kv_heads, "kv_heads")

    def __call__(
        self,
        x: Hidden,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        *,
        segment_ids: SegmentIds | None = None,
        state: MemoryState | None = None,
        length: Int[Array, "B"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T H D"], MemoryState | None]:
        """Writes the tokens into the memory and reads it at each of them.

        Args:
          x: the layer's input [B, T, E], for the memory's own deltas.
          q: raw queries [B, T, H, D].
          k: raw keys [B, T, K, D].
          v: raw values [B, T, K, D].
          segment_ids: packed documents, 0 = padding; with a `state`, one document a row.
          state: what an earlier call returned; None starts empty and returns None.
          length: tokens each row has seen before this call [B], with a `state`.
          dropout_key: turns dropout on.

        Returns:
          Output [B, T, H, D] in q's dtype and the state after the last token.
        """
        dtype = q.dtype
        q, k, v = (
            y if delta is None else y + delta(x).reshape(y.shape).astype(dtype)
            for delta, y in ((self.q_delta, q), (self.k_delta, k), (self.v_delta, v))
        )
        if self.config.operator == "tptt_reference":
            out, state = self._run_reference(RawTokens(q, k, v), segment_ids, state, length)
        elif state is None:
            out = self._run_rows(q, k, v, segment_ids)
        else:
            assert length is not None, "a state comes with the number of tokens it has seen"
            out, state = self._extend(q, k, v, segment_ids, state, length)
        # Over all heads; XLA's loops on CPU are slow where axes are joined.
        out = rms_normalize(save_mixed(out), axis=(-2, -1))
        if dropout_key is not None and self.config.dropout > 0:
            rate = self.config.dropout
            key = jax.random.fold_in(dropout_key, path_number("memory"))
            keep = save_mixed(jax.random.bernoulli(key, 1 - rate, out.shape))
            out = jnp.where(keep, out / (1 - rate), 0)
        return out.astype(dtype), state

    def _run_rows(self, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        config = self.config
        keys, values, beta, log_decay = _virtual_tokens(config, k, v, segment_ids)
        if config.recurrence.state_activation != "none" and segment_ids is not None:
            # Chunks of the row are not chunks of its documents: count tokens one by one.
            starts = _document_lengths(segment_ids)
            after = (starts % config.chunk_size == 0) & (segment_ids != 0)
            return naive_delta_product(
                *(_activate(q), keys, values, beta, log_decay),
                segment_ids=segment_ids,
                state_activation=config.recurrence.state_activation,
                activate_after=after,
            )[0]
        return chunk_delta_product(
            *(_activate(q), keys, values, beta, log_decay),
            segment_ids=segment_ids,
            chunk_size=config.chunk_size,
            state_activation=config.recurrence.state_activation,
            precision=config.precision,
        )[0]

    def _run_reference(
        self,
        raw: RawTokens,
        segment_ids: Array | None,
        state: MemoryState | None,
        length: Array | None,
    ) -> tuple[Array, MemoryState | None]:
        rule, chunk_size = self.config.recurrence, self.config.chunk_size
        if state is None:
            out = attend_tptt_reference(
                raw,
                rule,
                chunk_size=chunk_size,
                segment_ids=segment_ids,
                bidirectional=self.bidirectional,
            )
            return out, None
        assert length is not None, "a state comes with the number of tokens it has seen"
        assert state.queries is not None
        valid = jnp.ones(raw.keys.shape[:2], bool) if segment_ids is None else segment_ids != 0
        history = RawTokens(state.queries, *state.history)
        out, history, new_state = extend_tptt_reference(
            *(raw, valid, rule),
            chunk_size=chunk_size,
            history=history,
            state=state.state,
            length=length,
        )
        past = TokenHistory(history.keys, history.values)
        return out, MemoryState(new_state, past, history.queries)

    def _extend(
        self,
        q: Array,
        k: Array,
        v: Array,
        segment_ids: Array | None,
        state: MemoryState,
        length: Array,
    ) -> tuple[Array, MemoryState]:
        config, size = self.config, history_length(self.config)
        valid = jnp.ones(q.shape[:2], bool) if segment_ids is None else segment_ids != 0
        known = jnp.arange(size, 0, -1)[None] <= length[:, None]
        all_ids = jnp.concatenate([known, valid], axis=1).astype(jnp.int32)
        all_k, all_v = (
            jnp.concatenate([old.astype(new.dtype), new], axis=1)
            for old, new in zip(state.history, (k, v), strict=True)
        )
        inputs = _virtual_tokens(config, all_k, all_v, all_ids)
        keys, values, beta, log_decay = jax.tree.map(lambda x: x[:, size:], inputs)
        ids = valid.astype(jnp.int32)
        args = (_activate(q), keys, values, beta, log_decay, state.state, ids)
        if config.recurrence.state_activation != "none":
            after = (length[:, None] + jnp.cumsum(ids, axis=1)) % config.chunk_size == 0
            out, new_state = naive_delta_product(
                *args,
                state_activation=config.recurrence.state_activation,
                activate_after=after & valid,
            )
        elif q.shape[1] == 1:
            out, new_state = _one_token(*args)
        else:
            out, new_state = chunk_delta_product(
                *args, chunk_size=config.chunk_size, precision=config.precision
            )
        history = TokenHistory(
            extend_history(state.history.keys, k, valid),
            extend_history(state.history.values, v, valid),
        )
        return out, MemoryState(new_state, history)


def _virtual_tokens(
    config: LizaConfig, k: Array, v: Array, segment_ids: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Keys, values [B, T, N, K, D], write gate [B, T, N, K] or [.., D], log decay [B, T, K]."""
    rule = config.recurrence

    def expand(x: Array) -> Array:
        return expand_virtual_tokens(x, rule.num_householder, rule.trick, segment_ids)

    beta = compute_beta(
        *(rule.beta_gate, k, v, rule.num_householder),
        segment_ids=segment_ids,
        vector=config.vector_beta,
        trick=rule.trick if config.expand_gates else None,
    )
    log_decay = compute_log_decay(rule.alpha_gate, k, v, segment_ids)
    return expand(_activate(k)), expand(v * v.shape[-1] ** -0.5), beta, log_decay


def _activate(x: Array) -> Array:
    """SiLU, then the L2 norm over the head."""
    wide = jax.nn.silu(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    norm = jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-12))
    return (wide / norm).astype(x.dtype)


def _one_token(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    state: Array,
    ids: Array,
) -> tuple[Array, Array]:
    decay = None if log_decay is None else log_decay[:, 0]
    out, new_state = step_delta_product(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, decay)
    live = ids[:, 0, None, None] != 0
    return jnp.where(live, out, 0)[:, None], jnp.where(live[..., None], new_state, state)


def _document_lengths(segment_ids: Array) -> Array:
    """Tokens of the document up to and including each token [B, T]; padding counts none."""
    valid = segment_ids != 0
    count = jnp.cumsum(valid, axis=1)
    last_id = _previous_valid_id(segment_ids)
    before = jnp.where(valid & (segment_ids != last_id), count - 1, 0)
    return count - jax.lax.cummax(before, axis=1)


def _previous_valid_id(segment_ids: Array) -> Array:
    index = jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1]), -1)
    previous = jax.lax.cummax(jnp.pad(index[:, :-1], ((0, 0), (1, 0)), constant_values=-1), axis=1)
    found = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return jnp.where(previous >= 0, found, 0)


class LinearAttention(nnx.Module):
    """DeltaProduct attention with projections of its own, for any NNX model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = LinearAttention(32, num_heads=4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 7, 32))).shape
      (2, 7, 32)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        config: LizaConfig | None = None,
        bidirectional: bool = False,
        use_bias: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates q, k, v and output projections.

        Args:
          embed_dim: width E of the input and output.
          num_heads: query heads.
          num_kv_heads: key/value heads, each with one state; None: num_heads.
          head_dim: None: embed_dim / num_heads.
          config: operator, gates, chunk size, precision; its mixing fields are not used.
          bidirectional: for encoders: the mean of a pass forwards and one backwards.
          use_bias: biases on all four projections.
          dtype: of the parameters.
          rngs: for the initial values.

        Raises:
          ValueError: if the heads do not divide as needed.
        """
        num_kv_heads = num_kv_heads or num_heads
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim ({embed_dim}) is no multiple of num_heads ({num_heads}): give head_dim."
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})."
            )
        self.head_dim = head_dim or embed_dim // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.bidirectional = bidirectional

        def projection(name: str, size: tuple[int, int], axes: tuple[str, str]) -> Projection:
            return Projection(*size, path=name, axes=axes, bias=use_bias, dtype=dtype, rngs=rngs)

        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = projection("q_proj", (embed_dim, width), ("embed", "heads"))
        self.k_proj = projection("k_proj", (embed_dim, kv_width), ("embed", "kv_heads"))
        self.v_proj = projection("v_proj", (embed_dim, kv_width), ("embed", "kv_heads"))
        self.o_proj = projection("o_proj", (width, embed_dim), ("heads", "embed"))
        self.memory = DeltaMemory(
            *(embed_dim, num_heads, num_kv_heads, self.head_dim),
            config or LizaConfig(),
            bidirectional=bidirectional,
            rngs=rngs,
        )

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        return heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Hidden:
        """Attends within every document of every row.

        Args:
          x: [B, T, E].
          segment_ids: [B, T], 0 = padding; None: every row is one document.
          dropout_key: turns the dropout of `config` on.

        Returns:
          [B, T, E] in x's dtype; before the output bias, padding is zero.
        """
        args = (x, *self._project(x))
        out, _ = self.memory(*args, segment_ids=segment_ids, dropout_key=dropout_key)
        if self.bidirectional and self.memory.config.operator != "tptt_reference":
            flipped = [jnp.flip(y, axis=1) for y in args]
            ids = None if segment_ids is None else jnp.flip(segment_ids, axis=1)
            back, _ = self.memory(*flipped, segment_ids=ids, dropout_key=dropout_key)
            out = (out + jnp.flip(back, axis=1)) / 2
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> MemoryState:
        """The memory before the first token, for `extend`."""
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        return init_memory_state(self.memory.config, batch, *sizes, dtype)

    def extend(
        self,
        x: Hidden,
        state: MemoryState,
        length: Int[Array, "B"],
        valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[Hidden, MemoryState]:
        """Continues rows whose first `length` tokens are in `state`.

        Args:
          x: the next tokens [B, T, E].
          state: from `init_state` or from the call before.
          length: tokens already seen by each row [B].
          valid: False for padding [B, T].

        Returns:
          [B, T, E], and the state after them.

        Raises:
          ValueError: if the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot be extended: it reads the whole row.")
        ids = None if valid is None else valid.astype(jnp.int32)
        out, new_state = self.memory(
            x, *self._project(x), segment_ids=ids, state=state, length=length
        )
        assert new_state is not None
        return self.o_proj(out.reshape(*x.shape[:2], -1)), new_state
