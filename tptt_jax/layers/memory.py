"""The linear-attention memory: writing tokens, the recurrence, and reading with queries."""

import math
from typing import NamedTuple

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
)
from tptt_jax.layers.gates import GateLogits, ReadScale, WriteGates
from tptt_jax.layers.lora import LowRank, path_number
from tptt_jax.layers.norm import rms_normalize
from tptt_jax.layers.parameters import JoinedHeads, MemoryParam
from tptt_jax.ops.context import is_split
from tptt_jax.ops.delta_product import (
    chunk_delta_product,
    naive_delta_product,
    split_delta_product,
    step_delta_product,
)
from tptt_jax.ops.documents import tokens_so_far
from tptt_jax.ops.gates import compute_beta, compute_log_decay
from tptt_jax.ops.residuals import save_mixed
from tptt_jax.ops.tptt_reference import (
    RawTokens,
    attend_tptt_reference,
    extend_tptt_reference,
)
from tptt_jax.ops.virtual_tokens import expand_virtual_tokens


class MemoryTokens(NamedTuple):
    """The tokens to write into the memory, aligned with the queries that read it.

    With writes="all" a place writes its own token, with writes="evicted" the one that leaves the
    window there.

    Attributes:
      keys: [B, T, K, D]; raw projections, or with writes="evicted" after any k norm. Never rotated.
      values: [B, T, K, D].
      segment_ids: document of the token [B, T], 0 where a place has none; None: one document per
        row and a token at every place.
      writes: False where a token is not written, though later ones look back on it [B, T]; None:
        all are written.
      logits: of gates that the memory itself has computed.
      held: tokens that the memory holds at each place, its own included [B, T]; None: they are not
        counted.
    """

    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K D"]
    segment_ids: SegmentIds | None = None
    writes: Bool[Array, "B T"] | None = None
    logits: GateLogits = GateLogits()
    held: Int[Array, "B T"] | None = None

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """Whether a place has a token."""
        if self.segment_ids is None:
            return jnp.ones(self.keys.shape[:2], bool)
        return self.segment_ids != 0


class Written(NamedTuple):
    """The operator's inputs from tokens.

    Attributes:
      keys: virtual keys, unit norm [B, T, N, K, D].
      values: virtual values, likewise.
      beta: write gate [B, T, N, K] or [B, T, N, K, D].
      log_decay: logarithm of the forget gate [B, T, K]; None: nothing is forgotten.
    """

    keys: Float[Array, "B T N K D"]
    values: Float[Array, "B T N K D"]
    beta: Array
    log_decay: Float[Array, "B T K"] | None


class DeltaMemory(nnx.Module):
    """The memory on given queries, keys and values."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: LizaConfig,
        *,
        beta_max: float = 1.0,
        bidirectional: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the parts that `config` requires: low-rank deltas, gates, the output's scale.

        With writes="evicted" everything about a written token is computed from its key and value,
        which the window's cache still holds when the token leaves; nothing else is stored.

        Write gates lie between 0 and `beta_max`.

        `bidirectional` is for operator "tptt_reference", which turns virtual tokens around and not
        tokens; with the others two passes over the tokens do it.
        """
        self.config = config
        self.beta_max = beta_max
        self.bidirectional = bidirectional
        self.q_delta = self.k_delta = self.v_delta = self.gates = self.scale = nnx.data(None)
        kv_width, rank = num_kv_heads * head_dim, config.memory_rank
        if rank:

            def delta(source: tuple[int, str], heads: int, axis: str) -> LowRank:
                return LowRank(
                    source[0],
                    heads * head_dim,
                    rank=rank,
                    scale=config.memory_alpha / rank,
                    axes=(source[1], JoinedHeads(axis, heads)),
                    param=MemoryParam,
                    rngs=rngs,
                )

            of_layer = (embed_dim, "embed")
            of_token = (2 * kv_width, "kv") if config.writes == "evicted" else of_layer
            self.q_delta = delta(of_layer, num_heads, "heads")
            self.k_delta = delta(of_token, num_kv_heads, "kv_heads")
            self.v_delta = delta(of_token, num_kv_heads, "kv_heads")
        if "projected" in (config.beta_gate, config.alpha_gate):
            self.gates = WriteGates(config, num_kv_heads, head_dim)
        if config.linear_scale == "learned":
            self.scale = ReadScale(num_heads, head_dim)

    def __call__(
        self,
        x: Hidden,
        q: Float[Array, "B T H D"],
        tokens: MemoryTokens,
        *,
        state: MemoryState | None = None,
        length: Int[Array, "B"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T H D"], MemoryState | None]:
        """Writes tokens into the memory and reads it at each place.

        Args:
          x: the layer's input [B, T, E], for the memory's own deltas.
          q: queries [B, T, H, D], not rotated; raw, or with writes="evicted" after any q norm.
          tokens: what is written; where its segment_ids are 0 the output is 0. With a `state` a
            row is one document.
          state: what an earlier call returned; None starts empty and returns None.
          length: tokens each row has written before this call [B], with a `state`.
          dropout_key: turns dropout on.

        Returns:
          Output [B, T, H, D] in q's dtype and the state after the last token. All heads together
          have unit RMS unless linear_scale is "learned".
        """
        dtype, raw_q = q.dtype, q
        q, tokens = self._add_deltas(x, q, tokens)
        if self.config.operator == "tptt_reference":
            out, state = self._run_reference(q, tokens, state, length)
        elif state is None:
            out = self._run_rows(q, tokens)
        else:
            assert length is not None, "a state comes with the number of tokens it has seen"
            out, state = self._extend(q, tokens, state, length)
        out = save_mixed(out)
        if self.scale is not None:
            out = out * self.scale(raw_q)
        else:
            # Over all heads; XLA's loops on CPU are slow where axes are joined.
            out = rms_normalize(out, axis=(-2, -1))
        return self._drop(out, dropout_key).astype(dtype), state

    def written(self, x: Hidden, tokens: MemoryTokens) -> Written:
        """The operator's inputs from tokens, as a row without a state writes them.

        Args:
          x: the layer's input [B, T, E].
          tokens: what is written.
        """
        # Deltas of queries are not needed.
        return self._written(self._with_deltas(x, tokens))

    def _drop(self, out: Array, dropout_key: Array | None) -> Array:
        rate = self.config.dropout
        if dropout_key is None or rate == 0:
            return out
        key = jax.random.fold_in(dropout_key, path_number("memory"))
        keep = save_mixed(jax.random.bernoulli(key, 1 - rate, out.shape))
        return jnp.where(keep, out / (1 - rate), 0)

    def _add_deltas(self, x: Array, q: Array, tokens: MemoryTokens) -> tuple[Array, MemoryTokens]:
        """Adds the memory's own low-rank deltas to queries and tokens."""
        if self.q_delta is not None:
            q = _add_delta(q, self.q_delta, x)
        return q, self._with_deltas(x, tokens)

    def _with_deltas(self, x: Array, tokens: MemoryTokens) -> MemoryTokens:
        """Tokens with their low-rank deltas, and the logits of gates computed before those."""
        joined = _joined(tokens)
        if self.gates is not None:
            tokens = tokens._replace(logits=self.gates(joined))
        if self.k_delta is None or self.v_delta is None:
            return tokens
        source = joined if self.config.writes == "evicted" else x
        return tokens._replace(
            keys=_add_delta(tokens.keys, self.k_delta, source),
            values=_add_delta(tokens.values, self.v_delta, source),
        )

    def _run_rows(self, q: Array, tokens: MemoryTokens) -> Array:
        config, ids = self.config, tokens.segment_ids
        keys, values, beta, log_decay = self._written(tokens)
        inputs = (_activate(q), keys, values, beta, log_decay)
        activation = config.recurrence.state_activation
        if activation == "none" and is_split(q.shape[1]):
            return split_delta_product(
                *inputs, ids, chunk_size=config.chunk_size, precision=config.precision
            )
        if activation != "none" and ids is not None:
            # Chunks of the row are not chunks of its documents: count tokens one by one.
            after = (tokens_so_far(ids) % config.chunk_size == 0) & (ids != 0)
            return naive_delta_product(
                *inputs, segment_ids=ids, state_activation=activation, activate_after=after
            )[0]
        return chunk_delta_product(
            *inputs,
            segment_ids=ids,
            chunk_size=config.chunk_size,
            state_activation=activation,
            precision=config.precision,
        )[0]

    def _run_reference(
        self, q: Array, tokens: MemoryTokens, state: MemoryState | None, length: Array | None
    ) -> tuple[Array, MemoryState | None]:
        rule, chunk_size = self.config.recurrence, self.config.chunk_size
        raw = RawTokens(q, tokens.keys, tokens.values)
        if state is None:
            out = attend_tptt_reference(
                raw,
                rule,
                chunk_size=chunk_size,
                segment_ids=tokens.segment_ids,
                bidirectional=self.bidirectional,
            )
            return out, None
        assert length is not None, "a state comes with the number of tokens it has seen"
        assert state.queries is not None
        history = RawTokens(state.queries, *state.history)
        out, history, new_state = extend_tptt_reference(
            raw,
            tokens.valid,
            rule,
            chunk_size=chunk_size,
            history=history,
            state=state.state,
            length=length,
        )
        past = TokenHistory(history.keys, history.values)
        return out, MemoryState(new_state, past, history.queries)

    def _extend(
        self, q: Array, tokens: MemoryTokens, state: MemoryState, length: Array
    ) -> tuple[Array, MemoryState]:
        config, valid = self.config, tokens.valid
        ids = valid.astype(jnp.int32)
        keys, values, beta, log_decay = self._written_after(tokens, state.history, length)
        inputs = (_activate(q), keys, values, beta, log_decay)
        activation = config.recurrence.state_activation
        if activation != "none":
            after = (length[:, None] + jnp.cumsum(ids, axis=1)) % config.chunk_size == 0
            out, new_state = naive_delta_product(
                *inputs,
                state.state,
                ids,
                state_activation=activation,
                activate_after=after & valid,
            )
        elif q.shape[1] == 1:
            out, new_state = _one_token(*inputs, state.state, valid)
        else:
            out, new_state = chunk_delta_product(
                *inputs,
                state.state,
                ids,
                chunk_size=config.chunk_size,
                precision=config.precision,
            )
        history = TokenHistory(
            extend_history(state.history.keys, tokens.keys, valid),
            extend_history(state.history.values, tokens.values, valid),
        )
        return out, MemoryState(new_state, history)

    def _written_after(self, tokens: MemoryTokens, history: TokenHistory, length: Array) -> Written:
        """Written values of tokens whose gates and virtual tokens depend on earlier calls."""
        size = history_length(self.config)
        if not size:
            return self._written(tokens)
        known = jnp.arange(size, 0, -1)[None] <= length[:, None]

        def prepend(old: Array, new: Array) -> Array:
            return jnp.concatenate([old.astype(new.dtype), new], axis=1)

        def prepend_zeros(new: Array) -> Array:
            return jnp.pad(new, ((0, 0), (size, 0), *((0, 0),) * (new.ndim - 2)))

        seen = MemoryTokens(
            prepend(history.keys, tokens.keys),
            prepend(history.values, tokens.values),
            prepend(known, tokens.valid).astype(jnp.int32),
            *jax.tree.map(prepend_zeros, (tokens.writes, tokens.logits, tokens.held)),
        )
        return jax.tree.map(lambda x: x[:, size:], self._written(seen))

    def _written(self, tokens: MemoryTokens) -> Written:
        """Keys, values and gates of every virtual token."""
        rule, (k, v, ids, writes, *_) = self.config.recurrence, tokens

        def expand(x: Array) -> Array:
            return expand_virtual_tokens(x, rule.num_householder, rule.trick, ids)

        beta, log_decay = self._gates(tokens)
        log_decay = _forget_beyond(self.config.horizon, tokens.held, log_decay, beta)
        if writes is not None:
            beta = jnp.where(writes.reshape(*writes.shape, *(1,) * (beta.ndim - 2)), beta, 0)
            if log_decay is not None:
                log_decay = jnp.where(writes[..., None], log_decay, 0)
        scaled = v if self.scale is not None else v * v.shape[-1] ** -0.5
        return Written(expand(_activate(k)), expand(scaled), beta, log_decay)

    def _gates(self, tokens: MemoryTokens) -> tuple[Array, Array | None]:
        """Write gate [B, T, N, K] or [B, T, N, K, D], log decay [B, T, K]."""
        config, rule, (k, v, ids, _, logits, _) = self.config, self.config.recurrence, tokens
        if logits.beta is not None:
            beta = jax.nn.sigmoid(logits.beta)
        else:
            beta = compute_beta(
                rule.beta_gate,
                k,
                v,
                rule.num_householder,
                segment_ids=ids,
                vector=config.vector_beta,
                trick=rule.trick if config.expand_gates else None,
            )
        if self.beta_max != 1:
            beta = beta * self.beta_max
        if logits.keep is not None:
            return beta, jax.nn.log_sigmoid(logits.keep)
        return beta, compute_log_decay(rule.alpha_gate, k, v, ids)


def _add_delta(y: Array, delta: LowRank, source: Array) -> Array:
    return y + delta(source).reshape(y.shape).astype(y.dtype)


def _forget_beyond(
    horizon: int | None, held: Array | None, log_decay: Array | None, beta: Array
) -> Array | None:
    """Caps half-lives at horizon / 2 where the memory holds more than `horizon` tokens."""
    if horizon is None:
        return log_decay
    assert held is not None, "evicted tokens are counted"
    if log_decay is None:
        log_decay = jnp.zeros((*held.shape, beta.shape[3]), jnp.float32)
    most = math.log(0.5) / (horizon / 2)
    return jnp.where(held[..., None] > horizon, jnp.minimum(log_decay, most), log_decay)


def _joined(tokens: MemoryTokens) -> Array:
    """Keys and values of all heads side by side [B, T, 2 K D]."""
    batch, places = tokens.keys.shape[:2]
    parts = [x.reshape(batch, places, -1) for x in (tokens.keys, tokens.values)]
    return jnp.concatenate(parts, axis=-1)


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
    valid: Array,
) -> tuple[Array, Array]:
    decay = None if log_decay is None else log_decay[:, 0]
    out, new_state = step_delta_product(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, decay)
    live = valid[:, 0, None, None]
    return jnp.where(live, out, 0)[:, None], jnp.where(live[..., None], new_state, state)
