"""The memory of the PyPI package `tptt==0.12.1`, number for number.

It is not the delta rule of the paper (see docs/reference-operator.md): every token of a chunk
starts from the state before the chunk, only the chunk's last token passes its state on, and the
virtual tokens, gates and queries differ from the paper's too. With N virtual tokens j = 0 .. N-1
of each token, M = C * N of them in a chunk, S the state [D, D] before the chunk:

    L = tril((beta * K) K^T, -1);   (I + L) [W | U] = [beta * K | beta * V]
    for j = 0 .. N-1:   R_tj = U_tj - S_tj^T W_tj;   S_t,j+1 = S_tj * alpha_tj + W_tj R_tj^T
    O_t = S_t,N-1^T q_t,N-1 + q_t,N-1 * R_t,N-1;     S <- S_last,N  (activated, if configured)

where S_t0 = S, alpha acts on columns and * is elementwise. S_tj is S with scaled columns plus j
outer products, so the S_tj are never written out: reading one costs D^2 + j * 2 D.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, Int, SegmentIds
from tptt_jax.config import Gate, Recurrence, Trick
from tptt_jax.ops.delta_product.inputs import activate_state, compute_dtype
from tptt_jax.ops.delta_product.triangular import solve_unit_lower
from tptt_jax.ops.documents import document_ordinals
from tptt_jax.ops.gates import causal_mean
from tptt_jax.ops.residuals import scan_blocks
from tptt_jax.ops.token_shift import shift_tokens
from tptt_jax.ops.virtual_tokens import expand_virtual_tokens

INITIAL_STATE = 1e-6
"""Every entry of the memory before the first token."""
_CHUNKS_PER_BLOCK = 16


class RawTokens(NamedTuple):
    """Projected tokens before anything else.

    Attributes:
      queries: [B, T, H, D].
      keys: [B, T, K, D].
      values: [B, T, K, D].
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K D"]


class _Virtual(NamedTuple):
    """Virtual tokens, axes [B, T, K, ...]; the chunks of a row have [n, B, K, C, ...]."""

    q: Array  # [..., G, D]: of step N - 1 only
    k: Array  # [..., N, D]
    v: Array  # [..., N, D]
    alpha: Array  # [..., N, D]
    beta: Array  # [..., N, D]


def attend_tptt_reference(
    raw: RawTokens,
    rule: Recurrence,
    *,
    chunk_size: int = 64,
    segment_ids: SegmentIds | None = None,
    bidirectional: bool = False,
) -> Float[Array, "B T H D"]:
    """Computes `tptt.LinearAttention` between its projections and its RMS norm.

    The chunk is the largest divisor of T up to chunk_size, as there: another T, another result
    (a prime T has chunks of one token). As there, padding is not inert: its values are zero, but
    its keys, gates and virtual tokens count. Documents in a row, which the package cannot have,
    do not see each other, but their chunks are the row's.

    Args:
      raw: T tokens.
      rule: one of the nine operator modes, or any other.
      chunk_size: the package's max_chunk_size.
      segment_ids: document ids [B, T], 0 = padding; None: every row is one document.
      bidirectional: the mean of this and of the virtual tokens read backwards.

    Returns:
      [B, T, H, D] in float32 (float64 if an input is).
    """
    size = largest_divisor(raw.keys.shape[1], chunk_size)
    ids = None
    if segment_ids is not None:
        valid = (segment_ids != 0)[:, :, None, None]
        raw = raw._replace(values=jnp.where(valid, raw.values, 0))
        # Padding belongs to the document before it.
        ids = document_ordinals(segment_ids) + 1
    tokens = _virtual_tokens(raw, rule, ids)
    out, _ = _run(tokens, rule, size, ids=ids)
    if bidirectional:
        flipped = jax.tree.map(lambda x: jnp.flip(x, axis=1), tokens)
        back, _ = _run(flipped, rule, size, ids=None if ids is None else jnp.flip(ids, axis=1))
        out = (out + jnp.flip(back, axis=1)) / 2
    return out


def history_length(rule: Recurrence, chunk_size: int) -> int:
    """Raw tokens that `extend_tptt_reference` must be given of the past."""
    return chunk_size - 1 + _lookback(rule)


def extend_tptt_reference(
    raw: RawTokens,
    valid: Bool[Array, "B T"],
    rule: Recurrence,
    *,
    chunk_size: int,
    history: RawTokens,
    state: Float[Array, "B K D D"],
    length: Int[Array, "B"],
) -> tuple[Float[Array, "B T H D"], RawTokens, Float[Array, "B K D D"]]:
    """Continues rows, in chunks of `chunk_size` tokens counted from their first one.

    The package restarts its memory in every call, and its chunks depend on a length that a
    stream does not have yet. This gives, however the tokens are split into calls, what
    `attend_tptt_reference` gives for the whole row if that is no longer than chunk_size or a
    multiple of it. Padding is inert. Every call recomputes the current chunk.

    Args:
      raw: the next T tokens.
      valid: False for padding [B, T].
      rule: see `attend_tptt_reference`.
      chunk_size: likewise.
      history: the last `history_length` tokens, right-aligned.
      state: after the last complete chunk; `INITIAL_STATE` everywhere at first.
      length: tokens of each row before this call [B].

    Returns:
      Output [B, T, H, D], 0 at padding; the new history and the new state.
    """
    known, lookback = history.keys.shape[1], _lookback(rule)
    count = jnp.sum(valid, axis=1)
    valid_first = jnp.argsort(~valid, axis=1, stable=True)
    tokens = jax.tree.map(
        lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1), history, raw
    )

    def gather(start: Array, size: int) -> tuple[RawTokens, Array]:
        """Tokens at positions start .. start + size - 1 of each row, and which exist."""
        position = start[:, None] + jnp.arange(size)
        ahead = position - length[:, None]
        new = jnp.take_along_axis(valid_first, jnp.clip(ahead, 0, valid.shape[1] - 1), axis=1)
        index = jnp.where(ahead < 0, jnp.maximum(ahead + known, 0), new + known)
        exists = (position >= 0) & (ahead < count[:, None])
        take = functools.partial(_take, index=index, exists=exists)
        return jax.tree.map(take, tokens), exists

    before = length // chunk_size * chunk_size
    chunks = -(-(chunk_size - 1 + valid.shape[1]) // chunk_size)
    placed, exists = gather(before - lookback, lookback + chunks * chunk_size)
    virtual = _virtual_tokens(placed, rule, exists.astype(jnp.int32))
    out, new_state = _run(
        jax.tree.map(lambda x: x[:, lookback:], virtual),
        rule,
        chunk_size,
        initial_state=state,
        num_complete=(length + count) // chunk_size - length // chunk_size,
    )
    rank = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0) + (length - before)[:, None]
    new_history, _ = gather(length + count - known, known)
    new_history = jax.tree.map(lambda x, old: x.astype(old.dtype), new_history, history)
    return _take(out, rank, valid), new_history, new_state


def _take(x: Array, index: Array, exists: Array) -> Array:
    """x[b, index[b, t]] where it exists, else 0."""
    taken = jnp.take_along_axis(x, index[:, :, None, None], axis=1)
    return jnp.where(exists[:, :, None, None], taken, 0)


def _lookback(rule: Recurrence) -> int:
    """Tokens before a token that its virtual tokens depend on."""
    gated = (rule.alpha_gate, rule.beta_gate) != ("constant", "constant")
    return (0 if rule.trick == "rotary" else rule.num_householder - 1) + (2 if gated else 0)


def largest_divisor(length: int, limit: int) -> int:
    """The largest divisor of `length` that is at most `limit`, the package's chunk size."""
    return next((c for c in range(min(length, limit), 0, -1) if length % c == 0), 1)


def _virtual_tokens(raw: RawTokens, rule: Recurrence, ids: Array | None) -> _Virtual:
    dtype = compute_dtype(*raw)
    q, k, v = (x.astype(dtype) for x in raw)

    def expand(x: Array, *, gate: Gate | None = None) -> Array:
        trick = None if gate == "constant" else rule.trick
        return jnp.moveaxis(_expand(x, rule.num_householder, trick, ids), 2, 3)

    alpha, beta = _gates(k, v, rule, ids)
    return _Virtual(
        q=expand(_activate(q))[..., -1, :].reshape(*k.shape[:3], -1, k.shape[-1]),
        k=expand(_activate(k)),
        v=expand(v * v.shape[-1] ** -0.5),
        alpha=expand(alpha, gate=rule.alpha_gate),
        beta=expand(beta, gate=rule.beta_gate),
    )


def _activate(x: Array) -> Array:
    """SiLU, then the L2 norm over the head."""
    x = jax.nn.silu(x)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def _gates(k: Array, v: Array, rule: Recurrence, ids: Array | None) -> tuple[Array, Array]:
    """Forget and write gate, one per channel [B, T, K, D]."""
    forget, write = (jax.nn.sigmoid(causal_mean(x, ids)) for x in (k, v))
    gates = {"k": forget, "v": write, "kv": forget * write}
    alpha = gates.get(rule.alpha_gate, jnp.ones_like(k))
    return alpha, gates.get(rule.beta_gate, jnp.full_like(k, 0.5))


def _expand(x: Array, count: int, trick: Trick | None, ids: Array | None) -> Array:
    """[B, T, K, D] -> [B, T, N, K, D]; None repeats."""
    if trick is None or count == 1:
        return jnp.repeat(x[:, :, None], count, axis=2)
    if trick == "rotary":
        return expand_virtual_tokens(x, count, "rotary", ids)
    # Terms of the (N - 1)-th difference, one each, and not their sum.
    factors = [(-1) ** j * math.comb(count - 1, j) / 2 ** (count - 1) for j in range(count)]
    terms = [factors[-1 - j] * shift_tokens(x, j, ids)[0] for j in range(count)]
    derivatives = jnp.stack(terms, axis=2)
    if trick == "derivative":
        return derivatives
    return (derivatives + expand_virtual_tokens(x, count, "rotary", ids)) / 2


def _run(
    tokens: _Virtual,
    rule: Recurrence,
    size: int,
    *,
    ids: Array | None = None,
    initial_state: Array | None = None,
    num_complete: Array | None = None,
) -> tuple[Array, Array]:
    """Runs T / size chunks; those from number `num_complete` [B] on leave the state alone.

    Only the states between blocks of chunks are kept for the backward pass.
    """
    batch, length, kv_heads, groups, dim = tokens.q.shape
    count = max(length // size, 1)
    n = min(count, max(_CHUNKS_PER_BLOCK, math.isqrt(count)))
    blocks = -(-count // n)

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [blocks, n, B, C, ...]."""
        x = jnp.pad(x, ((0, 0), (0, blocks * n * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, n, size, *x.shape[2:]), 0, 2)

    own = before = None
    if ids is not None:
        own = cut(ids)
        before = cut(jnp.pad(ids, ((0, 0), (1, 0)), mode="edge")[:, :-1])[..., :1]
    if num_complete is None:
        num_complete = jnp.full((batch,), count)
    if initial_state is None:
        shape = (batch, kv_heads, dim, dim)
        initial_state = jnp.full(shape, INITIAL_STATE, tokens.k.dtype)
    # [blocks, n, B, K, C, ...]
    arranged = jax.tree.map(lambda x: jnp.swapaxes(cut(x), 3, 4), tokens)
    is_complete = (jnp.arange(blocks * n)[:, None] < num_complete).reshape(blocks, n, batch)
    run_block = functools.partial(_run_block, activation=rule.state_activation)
    state, out = scan_blocks(run_block, initial_state, (arranged, own, before, is_complete))
    out = jnp.moveaxis(out, (2, 4), (0, 3)).reshape(batch, -1, kv_heads * groups, dim)
    return out[:, :length], state


def _run_block(state: Array, block: tuple, *, activation: str) -> tuple[Array, Array]:
    """Runs chunks: first everything independent of the state, then its scan, then the outputs."""
    tokens, own, before, is_complete = block
    w, u = _solve(tokens, own)
    continues = None if own is None else (own == before)[:, :, None, :, None]

    def carry(state: Array, chunk: tuple) -> tuple[Array, Array]:
        w, u, alpha, continues, is_complete = chunk
        start, read = state, _read(w, state, continues)
        if continues is not None:
            start = jnp.where(continues, state, INITIAL_STATE)
        *_, residuals, scale = _steps(w, u, alpha, read)
        after = start * scale
        for step, residual in enumerate(residuals):
            after = after + w[:, :, 0, step, :, None] * residual
        if activation == "gelu":
            after = activate_state(after)
        return jnp.where(is_complete[:, None, None, None], after, state), state

    last = [x[..., -1:, :, :] for x in (w, u, tokens.alpha)]
    ends = None if continues is None else continues[..., -1:, :]
    state, states = jax.lax.scan(carry, state, (*last, ends, is_complete))
    earlier, scale, residuals, _ = _steps(w, u, tokens.alpha, _read(w, states, continues))
    q = tokens.q
    out = _read(q, states, continues) * scale[..., None, :] + q * residuals[-1][..., None, :]
    for step, residual in enumerate(earlier):
        out = out + jnp.sum(q * w[..., step, None, :], -1, keepdims=True) * residual[..., None, :]
    return state, out


def _solve(tokens: _Virtual, own: Array | None) -> tuple[Array, Array]:
    """W and U [n, B, K, C, N, D]."""
    *lead, size, steps, dim = tokens.k.shape
    k, v, beta = (x.reshape(*lead, size * steps, dim) for x in (tokens.k, tokens.v, tokens.beta))
    lower = _matmul(beta * k, jnp.swapaxes(k, -1, -2))
    if own is not None:
        document = jnp.repeat(own, steps, axis=-1)[:, :, None]
        lower = jnp.where(document[..., :, None] == document[..., None, :], lower, 0)
    right = jnp.concatenate([beta * k, beta * v], axis=-1)
    solved = solve_unit_lower(jnp.tril(lower, -1), right)
    w, u = jnp.split(solved.reshape(*lead, size, steps, 2 * dim), 2, axis=-1)
    return w, u


def _read(x: Array, state: Array, continues: Array | None) -> Array:
    """S^T x for x [..., C, N, D]; documents that start in the chunk have S = INITIAL_STATE."""
    read = _matmul(x.reshape(*x.shape[:-3], -1, x.shape[-1]), state).reshape(x.shape)
    if continues is None:
        return read
    return jnp.where(continues[..., None], read, INITIAL_STATE * jnp.sum(x, -1, keepdims=True))


def _steps(w: Array, u: Array, alpha: Array, read: Array) -> tuple[list, Array, list, Array]:
    """The Householder steps of every token by itself.

    The state after step j is S scaled by columns plus outer products of w_i and residual i.

    Args:
      w: [..., C, N, D].
      u: likewise.
      alpha: likewise.
      read: S^T w.

    Returns:
      Residuals and scale [..., C, D] before the last step, and both after it.
    """
    residuals, scale = [], jnp.ones_like(read[..., 0, :])
    earlier, scale_before = residuals, scale
    for step in range(w.shape[-2]):
        earlier, scale_before = residuals, scale
        w_now, alpha_now = w[..., step, :], alpha[..., step, :]
        residual = u[..., step, :] - read[..., step, :] * scale
        for i, other in enumerate(residuals):
            overlap = jnp.sum(w_now * w[..., i, :], axis=-1, keepdims=True)
            residual = residual - overlap * other
        residuals = [*(other * alpha_now for other in residuals), residual]
        scale = scale * alpha_now
    return earlier, scale_before, residuals, scale


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
