"""``python -m experiments.bench``: times the operator, a training step, decoding, long contexts."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from convert import load_pretrained, load_tokenizer
from convert.command_line import run_command
from experiments.context import measure_contexts, read_peer, write_context_report
from experiments.process import prepare_process
from experiments.prompts import document_tokens
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
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False,
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
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False,
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


def bench_context(
    model: str = "demo",
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144),
    data: Path | None = None,
    window: int = 1024,
    new_tokens: int = 96,
    full_read_limit: int = 16384,
    no_full: tyro.conf.FlagCreatePairsOff[bool] = False,
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    peer_json: tuple[Path, ...] = (),
    output: Path = Path("runs/context"),
) -> dict[str, Any]:
    """Measures a Titan with a window against full softmax as the context grows.

    Writes context.json and context.png.

    Args:
      model: what `load_pretrained` takes.
      contexts: tokens, those decoded at the end included, ascending.
      data: UTF-8 text to read, repeated as often as needed; None: random tokens.
      window: of the Titan's softmax attention.
      new_tokens: decoded at the end of each context.
      full_read_limit: longest context that full softmax, whose prefill is quadratic, reads.
      no_full: only the Titan.
      no_liza: a window without memory.
      dtype: of the base weights.
      peer_json: what other programs have measured, to be drawn with it; see
        tests/parity/transformers_context.py.
      output: directory.
    """
    prepare_process()
    if new_tokens < 64:
        raise ValueError(f"new_tokens must be at least 64, got {new_tokens}.")
    if list(contexts) != sorted(set(contexts)) or not contexts or contexts[0] <= new_tokens:
        raise ValueError(f"contexts must ascend from more than {new_tokens}, got {contexts}.")
    peers = [read_peer(path) for path in peer_json]
    tokens, runs = _context_tokens(model, data, contexts[-1]), {}
    name = f"window {window}, no memory" if no_liza else f"Titan, window {window}"
    kinds: list[tuple[str, LizaConfig | None, int]] = [
        (name, LizaConfig(softmax_window=window), contexts[-1])
    ]
    if not no_full:
        kinds.append(("full softmax", None, full_read_limit))
    for name, liza, limit in kinds:
        loaded = load_pretrained(model, liza, None, jnp.dtype(dtype))
        runs[name] = measure_contexts(
            loaded,
            tokens % loaded.config.vocab_size,
            contexts,
            new_tokens=new_tokens,
            read_limit=limit,
            use_memory=liza is not None and not no_liza,
        )
    for peer in peers:
        runs |= peer
    about = {"device": jax.devices()[0].device_kind, "model": model, "dtype": dtype}
    return write_context_report(output, runs, about)


def _context_tokens(model: str, data: Path | None, count: int) -> np.ndarray:
    if data is None:
        return np.random.default_rng(0).integers(10, 5000, count)
    pieces = document_tokens(load_tokenizer(model), data)
    return np.resize(np.concatenate(list(pieces)), count)


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
    commands = {
        "op": bench_op,
        "train": bench_train,
        "decode": bench_decode,
        "context": bench_context,
    }
    sys.exit(run_command(commands, prog="python -m experiments.bench"))


if __name__ == "__main__":
    main()
