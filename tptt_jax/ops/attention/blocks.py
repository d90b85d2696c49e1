"""Softmax attention of queries to several parts of keys at once, and its gradient."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tptt_jax.array_typing import Array, Bool, Float
from tptt_jax.ops.attention.softcap import apply_softcap, softcap_slope
from tptt_jax.ops.residuals import save_mixed

_MASKED = -1e30


class KeyValues(NamedTuple):
    """One part of the keys and values that queries attend to.

    Attributes:
      keys: rotated [B, S, K, D]; or keys of each query's own [B, T, S, K, D], S small.
      values: the same shape.
      mask: True where the query may see the key [B, T, S].
      queries: the queries for these keys if they are rotated differently [B, T, H, D].
    """

    keys: Float[Array, "B *T S K D"]
    values: Float[Array, "B *T S K D"]
    mask: Bool[Array, "B T S"]
    queries: Float[Array, "B T H D"] | None = None


class Attended(NamedTuple):
    """The result of softmax attention.

    Attributes:
      out: the weighted mean of the values [B, T, H, D], in the queries' dtype.
      log_mass: logarithm of the softmax's normaliser, the log-sum-exp of all visible logits
        [B, T, H], at least float32; about -5e29 where a query sees nothing. None from a kernel
        that does not give it.
    """

    out: Float[Array, "B T H D"]
    log_mass: Float[Array, "B T H"] | None


def attend(
    q: Float[Array, "B T H D"],
    parts: Sequence[KeyValues],
    *,
    scale: float,
    softcap: float | None = None,
) -> Attended:
    """softmax(scale q k^T) v over all parts together; the softmax is in float32.

    Keeping the parts apart saves joining them, which for a cache would copy it. Both results have
    gradients.

    Args:
      q: queries [B, T, H, D], rotated. H is a multiple of K.
      parts: keys and values, e.g. a cache, the tokens of this call, sinks.
      scale: factor on the logits.
      softcap: logits x become softcap * tanh(x / softcap).

    Returns:
      Output, zero where a query may see nothing, and the log of the normaliser.
    """
    return _attend(q, tuple(parts), scale, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(
    q: Array, parts: tuple[KeyValues, ...], scale: float, softcap: float | None
) -> Attended:
    return _attend_forward(q, parts, scale, softcap)[0]


def _attend_forward(
    q: Array, parts: tuple[KeyValues, ...], scale: float, softcap: float | None
) -> tuple[Attended, tuple]:
    """Output and residuals of the backward pass, which recomputes the logits."""
    logits = [_masked_logits(_queries_of(q, part), part, scale, softcap) for part in parts]
    tops = [jnp.max(x, axis=-1, keepdims=True) for x in logits]
    # Far above masked logits: if all are masked, every weight is 0.
    top = jnp.maximum(functools.reduce(jnp.maximum, tops), _MASKED / 2)
    weights = [jnp.exp(x - top) for x in logits]
    total = jnp.maximum(sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights), 1e-30)
    # Outputs are fewer than weights to divide, but in half precision their sums could overflow.
    divide_last = all(part.values.dtype == total.dtype for part in parts)
    if not divide_last:
        weights = [x / total for x in weights]
    outs = [
        _weigh_values(x.astype(part.values.dtype), part.values)
        for x, part in zip(weights, parts, strict=True)
    ]
    out = functools.reduce(jnp.add, outs)
    out = out / jnp.transpose(total, (0, 3, 1, 2, 4)) if divide_last else out
    out = out.reshape(q.shape).astype(q.dtype)
    out, log_total = save_mixed(out), save_mixed(top + jnp.log(total))
    return Attended(out, _by_query(log_total)), (q, parts, out, log_total)


def _attend_backward(
    scale: float, softcap: float | None, kept: tuple, gradient: Attended
) -> tuple[Array, tuple[KeyValues, ...]]:
    q, parts, out, log_total = kept
    wide = log_total.dtype
    grouped = _grouped(gradient.out.astype(q.dtype), parts[0])
    # Term that the gradients of all logits of a query share [B, K, G, T, 1].
    products = jnp.einsum("btkgd,btkgd->bkgt", grouped, _grouped(out, parts[0]))
    assert gradient.log_mass is not None
    of_mass = jnp.moveaxis(gradient.log_mass.astype(wide), 1, 2).reshape(products.shape)
    common = (products.astype(wide) - of_mass)[..., None]
    gradients, grad_q = [], jnp.zeros_like(q)
    for part in parts:
        queries = _queries_of(q, part)
        logits = _masked_logits(queries, part, scale, softcap)
        slope = scale * softcap_slope(logits, softcap)
        weights = jnp.exp(logits - log_total)
        grad_weights = _dot_keys(grouped, part.values).astype(wide)
        grad_values = _gather_tokens(weights.astype(grouped.dtype), grouped, part.values)
        grad_logits = (weights * (grad_weights - common) * slope).astype(queries.dtype)
        grad_keys = _gather_tokens(grad_logits, queries, part.keys)
        own = _weigh_values(grad_logits, part.keys).reshape(q.shape).astype(q.dtype)
        if part.queries is None:
            grad_q = grad_q + own
        no_mask = cast("Array", np.zeros(part.mask.shape, jax.dtypes.float0))
        queries_gradient = None if part.queries is None else own
        gradients.append(KeyValues(grad_keys, grad_values, no_mask, queries_gradient))
    return grad_q, tuple(gradients)


_attend.defvjp(_attend_forward, _attend_backward)


def _by_query(x: Array) -> Array:
    """[B, K, G, T, 1] -> [B, T, H]."""
    batch, _, _, tokens, _ = x.shape
    return jnp.moveaxis(x.reshape(batch, -1, tokens), 1, 2)


def _queries_of(q: Array, part: KeyValues) -> Array:
    """The queries for a part's keys [B, T, K, G, D]."""
    return _grouped(q if part.queries is None else part.queries, part)


def _masked_logits(queries: Array, part: KeyValues, scale: float, softcap: float | None) -> Array:
    """[B, K, G, T, S], at least float32."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    logits = apply_softcap(_dot_keys(queries, part.keys).astype(wide) * scale, softcap)
    return jnp.where(part.mask[:, None, None], logits, _MASKED)


def _grouped(x: Array, part: KeyValues) -> Array:
    """[B, T, H, D] -> [B, T, K, G, D]."""
    return x.reshape(*x.shape[:2], part.keys.shape[-2], -1, x.shape[-1])


def _dot_keys(q: Array, keys: Array) -> Array:
    """[B, T, K, G, D] x [B, S, K, D] or [B, T, S, K, D] -> [B, K, G, T, S]."""
    if keys.ndim == 4:
        logits = _batched(_by_head(q), jnp.swapaxes(keys, 1, 2), 3, 3)
        return logits.reshape(*logits.shape[:2], -1, q.shape[1], keys.shape[1])
    # One dot product per token and key: as a batched product this would be B T K tiny ones.
    logits = jnp.sum(q[:, :, None] * keys[:, :, :, :, None], axis=-1)  # [B, T, S, K, G]
    return jnp.transpose(logits, (0, 3, 4, 1, 2))


def _weigh_values(weights: Array, values: Array) -> Array:
    """[B, K, G, T, S] x [B, S, K, D] or [B, T, S, K, D] -> [B, T, K, G, D]."""
    if values.ndim == 4:
        out = _batched(_all_queries(weights), jnp.swapaxes(values, 1, 2), 3, 2)
        batch, kv_heads, groups, tokens, _ = weights.shape
        out = jnp.transpose(out.reshape(batch, -1, tokens, values.shape[-1]), (0, 2, 1, 3))
        return out.reshape(batch, tokens, kv_heads, groups, -1)
    per_token = jnp.transpose(weights, (0, 3, 4, 1, 2))  # [B, T, S, K, G]
    return jnp.sum(per_token[..., None] * values[:, :, :, :, None], axis=2)


def _gather_tokens(x: Array, queries: Array, keys: Array) -> Array:
    """[B, K, G, T, S] x [B, T, K, G, D] -> the shape and dtype of `keys`."""
    if keys.ndim == 4:
        out = _batched(_by_head(queries), _all_queries(x), 2, 2)
        return jnp.transpose(out, (0, 3, 1, 2)).astype(keys.dtype)
    per_token = jnp.transpose(x, (0, 3, 4, 1, 2))  # [B, T, S, K, G]
    return jnp.einsum("btskg,btkgd->btskd", per_token, queries).astype(keys.dtype)


def _batched(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Matrix products over axes of [B, K, X, Y], as they lie in memory.

    XLA multiplies matrices in either layout without a copy, but transposes arrays with more axes.
    """
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0, 1), (0, 1))))


def _by_head(queries: Array) -> Array:
    """[B, T, K, G, D] -> [B, K, G * T, D]."""
    batch, tokens, kv_heads, _, dim = queries.shape
    by_head = jnp.transpose(queries.reshape(batch, tokens, -1, dim), (0, 2, 1, 3))
    return by_head.reshape(batch, kv_heads, -1, dim)


def _all_queries(x: Array) -> Array:
    """[B, K, G, T, S] -> [B, K, G * T, S]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
