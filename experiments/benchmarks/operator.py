"""``python -m experiments.bench op``: the DeltaProduct operator on random inputs."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.benchmarks.flops import operator_flops
from experiments.benchmarks.timing import Job, Options, Timing, check_positive, measure
from tptt_jax.config import Precision
from tptt_jax.ops import chunk_delta_product
from tptt_jax.ops.delta_product.choice import choose_implementation
from tptt_jax.ops.delta_product.inputs import resolve_precision
from tptt_jax.ops.delta_product.plan import kernel_chunk_size, plan_chunks


@dataclass(frozen=True, kw_only=True)
class OpWork:
    """The operator on random inputs."""

    batch: int = 1
    """Rows."""
    tokens: int = 4096
    """Per row."""
    heads: int = 8
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads, each with a state of its own; None: as many as query heads."""
    head_dim: int = 64
    """Channels per head."""
    householder: int = 2
    """Householder steps per token."""
    chunk_size: int = 64
    """Most tokens per chunk."""
    precision: Precision = "auto"
    """Precision of matrix products outside the triangular solve; no effect on a CPU."""
    implementation: Literal["xla", "pallas"] | None = None
    """Implementation of the operator; None: the faster one."""
    decay: bool = False
    """With a forget gate."""
    grad: bool = False
    """Also computes all gradients."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs."""

    def __post_init__(self) -> None:
        """Rejects sizes below 1."""
        check_positive(self)


def bench_op(work: Options[OpWork], timing: Options[Timing]) -> dict[str, Any]:
    """Times the chunked DeltaProduct operator on random inputs, and names the implementation."""
    return measure("op", work, _operator, timing)


def _operator(work: OpWork) -> Job:
    keys = jax.random.split(jax.random.key(0), 5)
    kv_heads = work.kv_heads or work.heads
    queries = (work.batch, work.tokens, work.heads, work.head_dim)
    virtual = (work.batch, work.tokens, work.householder, kv_heads, work.head_dim)
    dtype = jnp.dtype(work.dtype)
    q = _unit(jax.random.normal(keys[0], queries, dtype))
    k = _unit(jax.random.normal(keys[1], virtual, dtype))
    v = jax.random.normal(keys[2], virtual, dtype)
    beta = jax.nn.sigmoid(jax.random.normal(keys[3], virtual[:-1], dtype))
    gate = jax.random.normal(keys[4], (work.batch, work.tokens, kv_heads))
    log_decay = jax.nn.log_sigmoid(gate + 4) if work.decay else None

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None
    ) -> jax.Array:
        return chunk_delta_product(
            q,
            k,
            v,
            beta,
            log_decay,
            chunk_size=work.chunk_size,
            precision=work.precision,
            implementation=work.implementation,
        )[0]

    function = jax.jit(forward)
    if work.grad:
        every = (0, 1, 2, 3, 4)
        function = jax.jit(jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), every))
    precision = resolve_precision(work.precision, q, k, v)
    chunk_size = plan_chunks(work.tokens, work.chunk_size).chunk_size
    asked = work.implementation
    chosen = asked or choose_implementation(q, k, v, beta, log_decay, None, precision)
    if chosen == "pallas":
        chunk_size = kernel_chunk_size(work.householder)
    flops = operator_flops(
        tokens=work.batch * work.tokens,
        heads=work.heads,
        kv_heads=kv_heads,
        head_dim=work.head_dim,
        householder=work.householder,
        chunk_size=chunk_size,
    )
    # Gradients take twice the operations of the forward pass, which they include.
    return Job(
        lambda: jax.block_until_ready(function(q, k, v, beta, log_decay)),
        work.batch * work.tokens,
        3 * flops if work.grad else flops,
        {"implementation": chosen},
    )


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True).astype(x.dtype)
