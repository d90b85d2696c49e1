"""``python -m experiments.bench``: times operators, a training step, decoding, long contexts."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert.command_line import run_command
from experiments.bench_attention import bench_attention
from experiments.bench_context import bench_context
from experiments.flops import decoding_flops, operator_flops, training_flops
from experiments.random_models import ModelChoice
from experiments.timing import Job, Options, Timing, check_positive, measure
from tptt_jax import LizaConfig, LoraConfig, generate
from tptt_jax.config import Precision, Remat
from tptt_jax.ops import chunk_delta_product
from tptt_jax.ops.delta_product_choice import choose_implementation
from tptt_jax.ops.delta_product_inputs import resolve_precision
from tptt_jax.ops.delta_product_plan import kernel_chunk_size, plan_chunks
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import TrainMode, split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

_PROMPT = np.arange(10, 16)


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
    """Tokens per chunk at most."""
    precision: Precision = "auto"
    """Of the matrix products outside the triangular solve; without effect on a CPU."""
    implementation: Literal["xla", "pallas"] | None = None
    """Of the operator; None: what is known to be faster."""
    decay: bool = False
    """With a forget gate."""
    grad: bool = False
    """Also all gradients."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs."""

    def __post_init__(self) -> None:
        """Rejects sizes below 1."""
        check_positive(self)


@dataclass(frozen=True, kw_only=True)
class TrainWork(ModelChoice):
    """A training step on random tokens."""

    batch: int = 2
    """Rows."""
    tokens: int = 256
    """Per row."""
    window: int | None = 64
    """Tokens that softmax attention sees; None: all, and a memory of evicted tokens is idle."""
    train: TrainMode = "lora"
    """"lora": adapters of rank 8 on q, k, v and o; "projections": these weights; "full": all;
    "memory": the memory alone."""
    remat: Remat = "none"
    """What the backward pass computes again. "none": only what takes longer to keep; "dots": all
    but products with weights; "full": whole layers."""


@dataclass(frozen=True, kw_only=True)
class DecodeWork(ModelChoice):
    """Greedy decoding after a short prompt."""

    batch: int = 1
    """Rows."""
    tokens: int = 128
    """New tokens of each row."""
    window: int | None = 64
    """Tokens that softmax attention sees; None: all, and a memory of evicted tokens is idle."""


def bench_op(work: Options[OpWork], timing: Options[Timing]) -> dict[str, Any]:
    """Times the chunked DeltaProduct operator on random inputs, and says which implementation."""
    return measure("op", work, _operator, timing)


def bench_train(work: Options[TrainWork], timing: Options[Timing]) -> dict[str, Any]:
    """Times one training step (AdamW, no dropout) on random tokens.

    With a memory behind a window the same step is timed in turn with the window alone.
    """
    return measure("train", work, _training, timing)


def bench_decode(work: Options[DecodeWork], timing: Options[Timing]) -> dict[str, Any]:
    """Times greedy decoding after a short prompt, the prefill included.

    With a memory behind a window the same is timed in turn with the window alone.
    """
    return measure("decode", work, _decoding, timing)


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
            *(q, k, v, beta, log_decay),
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
    # Gradients take twice as much as the forward pass, which they need as well.
    return Job(
        lambda: jax.block_until_ready(function(q, k, v, beta, log_decay)),
        work.batch * work.tokens,
        3 * flops if work.grad else flops,
        {"implementation": chosen},
    )


def _training(work: TrainWork) -> Job:
    liza = work.memory(work.window)
    if work.train == "memory":
        # The window alone has nothing to train.
        return _training_job(work, liza)
    return _with_control(liza, lambda liza: _training_job(work, liza))


def _training_job(work: TrainWork, liza: LizaConfig | None) -> Job:
    lora = LoraConfig(dropout=0.0) if work.train == "lora" else None
    model = work.load(liza, lora)
    config, memory = model.config, model.liza
    partition, trainable, share = split_trainable(model, work.train)
    optimizer = make_optimizer(OptimizerConfig(lr_schedule="constant"), 100)
    step = make_train_step(partition, optimizer, remat=work.remat)
    rows = np.random.default_rng(0).integers(10, 5000, (work.batch, work.tokens))
    rows = jnp.asarray(rows % config.vocab_size)
    data = Batch(rows, jnp.ones_like(rows), jnp.ones(rows.shape, bool))
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, partition.frozen, data)
        jax.block_until_ready(metrics)

    flops = training_flops(
        config, memory, model.lora, batch=work.batch, tokens=work.tokens, mode=work.train
    )
    return Job(run, work.batch * work.tokens, flops)


def _decoding(work: DecodeWork) -> Job:
    liza = work.memory(work.window)
    return _with_control(liza, lambda liza: _decoding_job(work, liza))


def _decoding_job(work: DecodeWork, liza: LizaConfig | None) -> Job:
    model = work.load(liza)
    prompt = np.tile(_PROMPT % model.config.vocab_size, (work.batch, 1))
    flops = decoding_flops(
        model.config, model.liza, batch=work.batch, prompt=prompt.shape[1], tokens=work.tokens
    )
    return Job(
        lambda: np.asarray(generate(model, prompt, work.tokens, stop_tokens=()).tokens),
        work.batch * work.tokens,
        flops,
    )


def _with_control(liza: LizaConfig | None, make: Callable[[LizaConfig | None], Job]) -> Job:
    """A job, and beside a memory behind a window the same with the window alone."""
    job = make(liza)
    if liza is None or liza.writes != "evicted" or liza.softmax_window is None:
        return job
    alone = dataclasses.replace(liza, writes="none")
    return job._replace(control=make(alone).run)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True).astype(x.dtype)


COMMANDS = {
    "op": bench_op,
    "train": bench_train,
    "decode": bench_decode,
    "attention": bench_attention,
    "context": bench_context,
}


def main() -> None:
    """The command."""
    sys.exit(run_command(COMMANDS, prog="python -m experiments.bench"))


if __name__ == "__main__":
    main()
