"""Whether the Pallas kernels compute on this machine what XLA's program computes."""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.ops.delta_product import chunk_delta_product
from tptt_jax.ops.delta_product_plan import kernel_chunk_size

# Two, so that programs find their rows and heads.
_ROWS = _KV_HEADS = 2
# bfloat16 kernels differ by 1% of a result's norm; what is compiled wrongly does by all of it.
_LARGEST_ERROR = 0.05


class KernelKind(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
      dim: channels D of queries and keys.
      value_dim: channels Dv of values.
      steps: Householder steps N.
      group: query heads of a KV head.
      per_channel: whether the write gate has a value for every channel.
      decay: whether there is a forget gate.
      documents: whether there are document ids.
    """

    dim: int
    value_dim: int
    steps: int
    group: int
    per_channel: bool
    decay: bool
    documents: bool


@functools.cache
def kernels_agree(kind: KernelKind) -> bool:
    """Compares outputs and all gradients of three chunks of random inputs; warns if they differ.

    Compilers of kernels have made wrong programs without a word, see `kernels.backward`. A
    process does this once for a kind, even while something else is being traced.

    Args:
      kind: of the kernels, for bfloat16 inputs at the default precision.

    Returns:
      False also if the kernels cannot be compiled or run.
    """
    try:
        errors = _compare(kind)
    # Compilers raise whatever they like.
    except Exception as error:
        lines = str(error).splitlines() or [""]
        problem = f"{type(error).__name__}: {lines[0]:.200}"
    else:
        # NaN is no agreement.
        wrong = {name: x for name, x in errors.items() if not x <= _LARGEST_ERROR}
        if not wrong:
            return True
        problem = ", ".join(f"{name} differs by {100 * x:.3g}%" for name, x in wrong.items())
    warnings.warn(
        f"the Pallas kernels for DeltaProduct fail with jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind} ({problem}), so XLA's program is taken, which computes "
        "the same in more time. TPTT_JAX_PALLAS=0 takes it without trying the kernels, "
        "TPTT_JAX_PALLAS=1 takes the kernels.",
        stacklevel=2,
    )
    return False


def _compare(kind: KernelKind) -> dict[str, float]:
    """What the kernels and XLA in float32 differ by, by name of the result or the gradient."""

    def compute(implementation: Literal["pallas", "xla"]) -> dict[str, Any]:
        return jax.device_get(_results(*_random_inputs(kind), implementation))

    # New threads know of no trace, mesh or precision that surrounds this call, and both compile
    # at the same time.
    with ThreadPoolExecutor(2) as threads:
        got, want = threads.map(compute, ("pallas", "xla"))
    return {name: _relative_error(got[name], want[name]) for name in want}


@functools.partial(jax.jit, static_argnames="implementation")
def _results(
    inputs: dict[str, Any],
    segment_ids: Any,
    weights: tuple[Any, Any],
    implementation: Literal["pallas", "xla"],
) -> dict[str, Any]:
    precision = "default" if implementation == "pallas" else "highest"

    def run(inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        out, state = chunk_delta_product(
            **inputs, segment_ids=segment_ids, precision=precision, implementation=implementation
        )
        out = out.astype(jnp.float32)
        total = jnp.vdot(weights[0], out) + jnp.vdot(weights[1], state)
        return total, {"the output": out, "the state": state}

    gradients, results = jax.grad(run, has_aux=True)(inputs)
    return results | {f"the gradient of {name}": x for name, x in gradients.items()}


def _random_inputs(kind: KernelKind) -> tuple[dict[str, Any], Any, tuple[Any, Any]]:
    """Arguments of the operator, document ids, and weights of output and state."""
    tokens = 2 * kernel_chunk_size(kind.steps) + 1
    heads = _KV_HEADS * kind.group
    virtual = (_ROWS, tokens, kind.steps, _KV_HEADS)
    state = (_ROWS, _KV_HEADS, kind.dim, kind.value_dim)
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    k = draw(*virtual, kind.dim)
    inputs = {
        "q": draw(_ROWS, tokens, heads, kind.dim),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": draw(*virtual, kind.value_dim),
        "beta": sigmoid(draw(*virtual, kind.dim) if kind.per_channel else draw(*virtual)),
    }
    inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    inputs["initial_state"] = jnp.asarray(draw(*state))
    if kind.decay:
        inputs["log_decay"] = jnp.asarray(np.log(sigmoid(draw(_ROWS, tokens, _KV_HEADS) + 3)))
    segment_ids = None
    if kind.documents:
        # A document that ends within a chunk, one that goes on in the next, padding.
        segment_ids = np.full((_ROWS, tokens), 2, np.int32)
        segment_ids[:, : tokens // 5], segment_ids[0, -tokens // 7 :] = 1, 0
        segment_ids = jnp.asarray(segment_ids)
    weights = (draw(_ROWS, tokens, heads, kind.value_dim), draw(*state))
    return inputs, segment_ids, weights


def _relative_error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
