"""``python -m experiments.bench attention``: fused softmax attention beside `attend_sequence`."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import Options, check_positive, machine
from experiments.process.compilation_cache import prepare_process
from tptt_jax.ops.attention import attend_sequence, can_fuse, fused_attention


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """Softmax attention on random inputs, forwards and backwards."""

    batch: int = 8
    """Rows."""
    tokens: int = 2048
    """Per row."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """Key/value heads."""
    head_dim: int = 64
    """Channels per head."""
    window: int | None = None
    """Tokens that a query sees; None: all before it."""
    documents: int | None = None
    """Documents of equal length in every row; None: each row is one document."""
    repeats: int = 5
    """Timed runs after the first, which compiles; the median counts."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the inputs."""

    def __post_init__(self) -> None:
        """Rejects sizes below 1."""
        check_positive(self)


def bench_attention(work: Options[AttentionWork]) -> dict[str, Any]:
    """Compares the fused attention, cuDNN's where available, with the memory-bounded one.

    "difference" is the largest difference of the output and of each gradient, relative to the
    largest value; "median_s" is the time of the output and all gradients together.
    """
    prepare_process()
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(work.batch, work.tokens, heads, work.head_dim) for heads in _heads(work)]
    *inputs, weights = (
        jax.random.normal(key, size, jnp.dtype(work.dtype))
        for key, size in zip(keys, sizes, strict=True)
    )
    ids = None
    if work.documents is not None:
        row = jnp.arange(work.tokens) * work.documents // work.tokens + 1
        ids = jnp.broadcast_to(row, (work.batch, work.tokens)).astype(jnp.int32)
    fuses = can_fuse(inputs[0], segment_ids=ids, sinks=None, softcap=None)
    implementation = "cudnn" if fuses else "xla"
    fused = functools.partial(fused_attention, implementation=implementation)
    options = {"segment_ids": ids, "window": work.window, "scale": work.head_dim**-0.5}
    results, seconds = {}, {}

    def bounded(*args: jax.Array, **options: Any) -> jax.Array:
        return attend_sequence(*args, **options).out

    for name, attention in (("fused", fused), ("bounded", bounded)):
        run = _with_gradients(functools.partial(attention, **options))
        results[name], _ = _timed(run, *inputs, weights)
        every = [_timed(run, *inputs, weights)[1] for _ in range(work.repeats)]
        seconds[name] = statistics.median(every)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    pairs = zip(names, results["fused"], results["bounded"], strict=True)
    return {
        "bench": "attention",
        **machine(),
        "workload": dataclasses.asdict(work),
        "fused": implementation,
        "difference": {name: _difference(*pair) for name, *pair in pairs},
        "median_s": seconds,
    }


def _heads(work: AttentionWork) -> tuple[int, int, int, int]:
    """Heads of the queries, keys, values and output weights."""
    return work.heads, work.kv_heads, work.kv_heads, work.heads


def _with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> tuple:
        out, pullback = jax.vjp(attention, q, k, v)
        return out, *pullback(weights)

    return jax.jit(run)


def _timed(run: Callable[..., tuple], *inputs: jax.Array) -> tuple[tuple, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(run(*inputs))
    return result, time.perf_counter() - start


def _difference(got: jax.Array, expected: jax.Array) -> float:
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.max(jnp.abs(got - expected)) / jnp.max(jnp.abs(expected)))
