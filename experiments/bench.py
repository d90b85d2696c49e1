"""``python -m experiments.bench``: times the operator, a training step, or decoding."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert import load_pretrained
from convert.command_line import run_command
from experiments.process import prepare_process
from tptt_jax import CausalLM, LizaConfig, LoraConfig, generate
from tptt_jax.ops import chunk_delta_product
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step


def bench_op(
    tokens: int = 4096,
    heads: int = 8,
    head_dim: int = 64,
    householder: int = 2,
    chunk_size: int = 64,
    grad: bool = False,
    repeats: int = 5,
) -> dict[str, Any]:
    """Times the chunked DeltaProduct operator on one row of random float32 inputs.

    Args:
      tokens: length of the row.
      heads: query heads, each with a state of its own.
      head_dim: channels per head.
      householder: Householder steps per token.
      chunk_size: tokens per chunk.
      grad: also all gradients.
      repeats: timed runs; the median counts.
    """
    prepare_process()
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, tokens, householder, heads, head_dim)
    q = _unit(jax.random.normal(keys[0], (1, tokens, heads, head_dim)))
    k = _unit(jax.random.normal(keys[1], shape))
    v = jax.random.normal(keys[2], shape)
    beta = jax.nn.sigmoid(jax.random.normal(keys[3], shape[:-1]))

    def forward(*inputs: jax.Array) -> jax.Array:
        return chunk_delta_product(*inputs, chunk_size=chunk_size)[0]

    function = jax.jit(jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2, 3)) if grad else forward)
    return _measure(lambda: jax.block_until_ready(function(q, k, v, beta)), tokens, repeats)


def bench_train(
    model: str = "demo",
    batch: int = 2,
    tokens: int = 256,
    no_liza: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: bool = False,
    repeats: int = 3,
) -> dict[str, Any]:
    """Times one LoRA step (rank 8 on q, k, v, o; AdamW; no dropout) on random tokens.

    Args:
      model: what `load_pretrained` takes.
      batch: rows.
      tokens: per row.
      no_liza: leave the memory out.
      dtype: of the base weights.
      remat: recompute layers in the backward pass.
      repeats: timed steps; the median counts.
    """
    prepare_process()
    loaded = _load(model, no_liza, dtype, LoraConfig(dropout=0.0))
    partition, trainable, share = split_trainable(loaded, "lora")
    optimizer = make_optimizer(OptimizerConfig(lr_schedule="constant"), 100)
    step = make_train_step(partition, optimizer, remat=remat)
    rows = np.random.default_rng(0).integers(10, 5000, (batch, tokens)) % loaded.config.vocab_size
    rows = jnp.asarray(rows)
    data = Batch(rows, jnp.ones_like(rows), jnp.ones(rows.shape, bool))
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, partition.frozen, data)
        jax.block_until_ready(metrics)

    return _measure(run, batch * tokens, repeats)


def bench_decode(
    model: str = "demo",
    tokens: int = 64,
    no_liza: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    repeats: int = 3,
) -> dict[str, Any]:
    """Times greedy decoding of one row after a short prompt, the prefill included.

    Args:
      model: what `load_pretrained` takes.
      tokens: new tokens.
      no_liza: leave the memory out.
      dtype: of the base weights.
      repeats: timed runs; the median counts.
    """
    prepare_process()
    loaded = _load(model, no_liza, dtype, None)
    prompt = np.arange(10, 16)[None] % loaded.config.vocab_size
    return _measure(
        lambda: np.asarray(generate(loaded, prompt, tokens, stop_tokens=()).tokens),
        tokens,
        repeats,
    )


def _load(model: str, no_liza: bool, dtype: str, lora: LoraConfig | None) -> CausalLM:
    return load_pretrained(model, None if no_liza else LizaConfig(), lora, jnp.dtype(dtype))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _measure(run: Callable[[], object], tokens: int, repeats: int) -> dict[str, Any]:
    """The first run compiles and is reported apart."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {
        "device": jax.devices()[0].device_kind,
        "median_s": median,
        "tokens_per_s": tokens / median,
        "first_run_s": seconds[0],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> None:
    """The command."""
    commands = {"op": bench_op, "train": bench_train, "decode": bench_decode}
    sys.exit(run_command(commands, prog="python -m experiments.bench"))


if __name__ == "__main__":
    main()
