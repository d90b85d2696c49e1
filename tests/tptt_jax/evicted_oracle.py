"""The memory of evicted tokens, token by token in float64 numpy: section 8 of the design.

    full_t = (Z_in o_in + Z_out o_out) / (Z_in + Z_out)
    share_t = sigmoid(log Z_out - log Z_in),  log Z_out = w_h . q_t + a_h log n_t + b_h
    o_t = o_in + share_t (scale_h S^T q' - o_in)

Nothing here is shared with the library but the names of parameters and of options.
"""

from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tptt_jax import LizaConfig, ModelConfig


class Expected(NamedTuple):
    """What a layer gives for one document."""

    out: np.ndarray  # [T, E]
    softmax: np.ndarray  # [T, H, D]
    linear: np.ndarray  # [T, H, D]
    share: np.ndarray  # [T, H]
    log_in: np.ndarray  # [T, H]
    state: np.ndarray  # [K, D, D]


def weights_of(module: nnx.Module) -> Any:
    """Parameters as nested dicts of float64 arrays."""
    return _wide(nnx.to_pure_dict(nnx.state(module)))


def run_layer(
    weights: Any, config: ModelConfig, liza: LizaConfig, x: np.ndarray, scheduled: float = 0.0
) -> Expected:
    """One attention layer on one document x [T, E], which starts at position 0."""
    heads, groups = config.num_heads, config.num_heads // config.num_kv_heads
    window, sinks = liza.softmax_window, liza.softmax_sinks
    assert window is not None
    q, k, v = _project(weights, config, x)
    length = len(x)
    tokens = _written(weights.get("memory", {}), liza, k, v)
    reading = _unit(_silu(q + _low_rank(weights["memory"].get("q_delta"), liza, x, q.shape)))
    state = np.zeros((config.num_kv_heads, config.head_dim, config.head_dim))
    soft, linear = np.zeros(q.shape), np.zeros(q.shape)
    share, log_in = np.zeros((length, heads)), np.zeros((length, heads))
    held = 0
    for t in range(length):
        leaving = t - window
        if leaving >= sinks:
            held += 1
            _write(state, tokens, leaving)
        for head in range(heads):
            group = head // groups
            soft[t, head], log_in[t, head] = _attend(
                config, q[t, head], k[:, group], v[:, group], t, window, sinks
            )
            linear[t, head] = state[group].T @ reading[t, head]
        linear[t] = _sized(weights, liza, linear[t], q[t])
        if held:
            share[t] = _share(weights, liza, q[t], log_in[t], held, scheduled)
    matched = linear
    if liza.linear_scale == "match":
        matched = linear * np.sqrt(_mean_square(soft, 1e-12) / _mean_square(linear, 1e-6))
    mixed = soft + share[..., None] * (matched - soft)
    out = mixed.reshape(length, -1) @ weights["o_proj"]["kernel"]
    out = out + weights["o_proj"].get("bias", 0)
    return Expected(out, soft, linear, share, log_in, state)


def _project(weights, config, x):
    """Queries, keys and values as softmax attention takes them, not rotated."""
    made = []
    for name in "qkv":
        projection = weights[f"{name}_proj"]
        y = x @ projection["kernel"] + projection.get("bias", 0)
        y = y.reshape(len(x), -1, config.head_dim)
        if name != "v" and config.attention.qk_norm == "head":
            y = y / np.sqrt(_mean_square(y, config.norm.eps)) * weights[f"{name}_norm"]["weight"]
        made.append(y)
    return made


def _attend(config, query, keys, values, t, window, sinks):
    """Softmax over the window and the sinks; the distance to a sink is capped."""
    seen = [s for s in range(t + 1) if s < sinks or s > t - window]
    logits = []
    for s in seen:
        place = min(t, window + sinks) if s < sinks else t
        logit = config.attention_scale * (
            _rotate(config, query, place) @ _rotate(config, keys[s], s)
        )
        cap = config.attention.softcap
        logits.append(logit if cap is None else cap * np.tanh(logit / cap))
    top = max(logits)
    exponentials = np.exp(np.array(logits) - top)
    total = exponentials.sum()
    return (exponentials / total) @ values[seen], top + np.log(total)


def _rotate(config, x, position):
    if config.position_embedding == "learned":
        return x
    half = x.shape[-1] // 2
    angle = position * config.rope.theta ** -(np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def _written(memory, liza, k, v):
    """Virtual keys and values [T, N, K, D], write gates [T, N, K], forget gates [T, K]."""
    length, kv_heads, dim = k.shape
    joined = np.concatenate([k.reshape(length, -1), v.reshape(length, -1)], axis=1)
    logits = {
        name: joined @ gate["kernel"] + gate["bias"]
        for name, gate in memory.get("gates", {}).items()
    }
    k = k + _low_rank(memory.get("k_delta"), liza, joined, k.shape)
    v = v + _low_rank(memory.get("v_delta"), liza, joined, v.shape)
    steps = liza.num_householder
    padded = np.concatenate([k[:1], k[:1], k])
    of_keys = _sigmoid((padded[2:] + padded[1:-1] + padded[:-2]) / 3).mean(-1)
    kinds = {"k": of_keys, "constant": np.ones((length, kv_heads))}
    beta, keep = kinds.get(liza.beta_gate), kinds.get(liza.alpha_gate)
    if "beta" in logits:
        beta = _sigmoid(logits["beta"]).reshape(length, steps, kv_heads)
    else:
        beta = np.repeat(beta[:, None], steps, axis=1)
    keep = _sigmoid(logits["keep"]) if "keep" in logits else keep
    keys, values = [_unit(_silu(k))], [v if liza.linear_scale == "learned" else v / dim**0.5]
    for _ in range(steps - 1):
        for all_steps in (keys, values):
            last = all_steps[-1]
            before = np.concatenate([np.zeros_like(last[:1]), last[:-1]])
            all_steps.append((last - before) / 2)
    return np.stack(keys, 1), np.stack(values, 1), beta, keep


def _write(state, tokens, s):
    """One token into the state of every key/value head, in place."""
    keys, values, beta, keep = tokens
    for head in range(len(state)):
        state[head] *= keep[s, head]
        for step in range(keys.shape[1]):
            key, value, gate = keys[s, step, head], values[s, step, head], beta[s, step, head]
            state[head] += np.outer(key, gate * value - state[head].T @ (gate * key))


def _sized(weights, liza, linear, q):
    """What a head's read-out is multiplied by, [H, D]."""
    if liza.linear_scale != "learned":
        return linear / np.sqrt((linear**2).mean() + 1e-6)
    scale = weights["memory"]["scale"]
    log_scale = (q * scale["weight"]).sum(-1) + scale["bias"]
    return linear * np.exp(np.clip(log_scale, -4, 4))[:, None]


def _share(weights, liza, q, log_in, held, scheduled):
    if liza.mag == "scheduled":
        return np.full(len(q), scheduled)
    mag = weights["mag"]
    if liza.mag == "learned":
        return _sigmoid(mag["logit"])
    log_n = np.minimum(np.log(held), mag["limit"])
    log_out = (q * mag["weight"]).sum(-1) + mag["slope"] * log_n + mag["bias"]
    return _sigmoid(log_out - log_in)


def _low_rank(delta, liza, x, shape):
    if delta is None:
        return np.zeros(shape)
    return (x @ delta["a"] @ delta["b"]).reshape(shape) * (liza.memory_alpha / liza.memory_rank)


def _wide(tree):
    if isinstance(tree, dict):
        return {name: _wide(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _silu(x):
    return x * _sigmoid(x)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _mean_square(x, guard):
    return (x**2).mean(-1, keepdims=True) + guard
