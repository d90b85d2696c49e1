"""``python -m experiments.bench memory``: what a step of LoRA training holds, compiled, not run."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.random_models import SHAPES, Shape
from experiments.benchmarks.timing import Options, check_positive, write_result
from tptt_jax import CausalLM, LoraConfig, ModelConfig
from tptt_jax.config import Remat
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import Partition, split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step


@dataclass(frozen=True, kw_only=True)
class MemoryWork:
    """A step of LoRA training on a model of this shape, without a memory."""

    random_weights: Shape = "llama3.2-1b"
    """Shape of the model; no weights are made."""
    batch: int = 1
    """Rows."""
    tokens: int = 512
    """Tokens of a row."""
    rank: int = 8
    """Of the adapters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations and of base weights that are not quantised."""
    base_dtype: BaseDtype | None = None
    """Of the base model's matrices; None: dtype."""
    remat: Remat = "none"
    """What the backward pass recomputes."""

    def __post_init__(self) -> None:
        """Rejects sizes below 1."""
        check_positive(self)


def bench_memory(work: Options[MemoryWork], output: Path | None = None) -> dict[str, Any]:
    """Compiles a step for one device and reports the bytes that it holds.

    XLA plans the step's temporary arrays (`step_bytes`) when it compiles; the rest are the sizes of
    the arguments.

    Args:
      work: what is compiled.
      output: a JSON file for the report; None: it is only printed.
    """
    shape = (work.batch, work.tokens)
    report = step_memory(
        SHAPES[work.random_weights](),
        LoraConfig(rank=work.rank),
        shape,
        dtype=jnp.dtype(work.dtype),
        base_dtype=work.base_dtype,
        remat=work.remat,
    )
    report = {"bench": "memory", "workload": dataclasses.asdict(work)} | report
    if output is not None:
        write_result(output, report)
    return report


def step_memory(
    config: ModelConfig,
    lora: LoraConfig,
    shape: tuple[int, int],
    *,
    dtype: jnp.dtype,
    base_dtype: BaseDtype | None = None,
    remat: Remat = "none",
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Bytes of a compiled step of LoRA training; no weights are made.

    Args:
      config: of the model.
      lora: its adapters.
      shape: rows and tokens.
      dtype: of the activations and of plain base weights.
      base_dtype: of quantised ones.
      remat: what the backward pass recomputes.
      compiler_options: of XLA.

    Returns:
      `base_bytes`, `state_bytes` of adapters and optimizer, `step_bytes` of what the step holds
      besides, and their sum `total_bytes`.
    """
    parts: list[Partition] = []

    def build() -> tuple[nnx.State, dict[str, jax.Array]]:
        options: Any = {"dtype": dtype, "base_dtype": base_dtype, "rngs": nnx.Rngs(0)}
        partition, trainable, _ = split_trainable(CausalLM(config, None, lora, **options), "lora")
        parts.append(partition)
        return partition.frozen, trainable

    frozen, trainable = jax.eval_shape(build)
    optimizer = make_optimizer(OptimizerConfig(), 10, parts[0])
    key = jax.random.key(0)
    state = jax.eval_shape(lambda x: init_train_state(x, None, optimizer, key), trainable)
    rows: Any = [jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.int32, jnp.bool)]
    batch = Batch(*rows)
    step: Any = make_train_step(parts[0], optimizer, remat=remat)
    compiled = step.lower(state, frozen, batch).compile(compiler_options)
    base, of_state = (sum(_bytes(x) for x in jax.tree.leaves(tree)) for tree in (frozen, state))
    besides = int(compiled.memory_analysis().temp_size_in_bytes)
    sizes = {"base_bytes": base, "state_bytes": of_state, "step_bytes": besides}
    return sizes | {"total_bytes": sum(sizes.values())}


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return 8 if is_key else x.size * x.dtype.itemsize
