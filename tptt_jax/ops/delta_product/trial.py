"""A trial that compares the Pallas kernels with the recurrence on this machine; see `warm_up`."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.ops.delta_product.kernel import kernel_delta_product
from tptt_jax.ops.delta_product.kernel_kind import KernelKind
from tptt_jax.ops.delta_product.naive import naive_delta_product
from tptt_jax.ops.delta_product.plan import kernel_chunk_size

# Two, so that programs must find their rows and heads; chunks that fill a pipeline of loads.
_ROWS, _KV_HEADS, _CHUNKS = 2, 2, 4
# Of a chunk of a result, by norm. Rounding to bfloat16 makes up to 2%.
_LARGEST_ERROR = 0.1


# What trials of this process have found; None: the kernels are right.
_PROBLEMS: dict[KernelKind, str | None] = {}


def kernels_agree(kind: KernelKind) -> bool:
    """Compares the kernels with `naive_delta_product` on random inputs; warns if they differ.

    Outputs and all gradients of a few chunks, the inputs in bfloat16 at the default precision.
    Kernel compilers have silently miscompiled, see `kernels.backward`. The verdict is kept for the
    process.

    Args:
      kind: of the kernels.

    Returns:
      False also if the kernels cannot be compiled or run.

    Raises:
      RuntimeError: if they fail and there are other processes, which would run another program.
    """
    if kind not in _PROBLEMS:
        _PROBLEMS[kind] = _find_problem(kind)
    problem = _PROBLEMS[kind]
    if problem is None:
        return True
    text = (
        f"the Pallas kernels for DeltaProduct fail with jax {jax.__version__} on "
        f"{jax.local_devices()[0].device_kind}: {problem} ({kind})."
    )
    if jax.process_count() > 1:
        raise RuntimeError(f"{text} Set TPTT_JAX_PALLAS=0 in all processes to use XLA's program.")
    warnings.warn(
        f"{text} XLA's program is used, which computes the same in more time. TPTT_JAX_PALLAS=0 "
        "uses it without a trial, TPTT_JAX_PALLAS=1 the kernels, even if they are wrong.",
        stacklevel=2,
    )
    return False


def earlier_verdict(kind: KernelKind) -> bool | None:
    """What `kernels_agree` has found in this process; None: these kernels were not tried."""
    return _PROBLEMS[kind] is None if kind in _PROBLEMS else None


def _find_problem(kind: KernelKind) -> str | None:
    try:
        errors = _compare(kind)
    # Compilers raise arbitrary exceptions.
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]:.200}"
    # NaN counts as disagreement.
    wrong = {name: x for name, x in errors.items() if not x <= _LARGEST_ERROR}
    return ", ".join(f"{name} differs by {100 * x:.3g}%" for name, x in wrong.items()) or None


def _compare(kind: KernelKind) -> dict[str, float]:
    """Error of the kernels against the recurrence, by name of the result or gradient."""
    data = _random_inputs(kind)
    # New threads do not inherit this call's trace, mesh and precision, and both compile in
    # parallel.
    with ThreadPoolExecutor(2) as threads:
        by_kernels, by_recurrence = (
            threads.submit(_results, *data, use_kernels=each) for each in (True, False)
        )
        try:
            expected = by_recurrence.result()
        except Exception as error:
            raise RuntimeError(f"nothing to compare them with, {error}") from error
        got = by_kernels.result()
    return {name: _largest_error(got[name], expected[name]) for name in expected}


def _results(
    inputs: dict[str, Any], segment_ids: Any, weights: tuple[Any, Any], *, use_kernels: bool
) -> dict[str, np.ndarray]:
    """The output, the last state and all gradients, by name."""
    inputs, segment_ids, weights = jax.tree.map(jnp.asarray, (inputs, segment_ids, weights))

    def run(inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        q, k, v, beta, state = (inputs[x] for x in ("q", "k", "v", "beta", "initial_state"))
        decay = inputs.get("log_decay")
        if use_kernels:
            out, last = kernel_delta_product(q, k, v, beta, decay, state, segment_ids, "default")
        else:
            out, last = naive_delta_product(q, k, v, beta, decay, state, segment_ids)
        out = out.astype(jnp.float32)
        total = jnp.vdot(weights[0], out) + jnp.vdot(weights[1], last)
        return total, {"the output": out, "the state": last}

    if not use_kernels:
        inputs = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    gradients, results = jax.jit(jax.grad(run, has_aux=True))(inputs)
    results |= {f"the gradient of {name}": x for name, x in gradients.items()}
    return {name: np.asarray(x, np.float64) for name, x in jax.device_get(results).items()}


def _random_inputs(kind: KernelKind) -> tuple[dict[str, Any], Any, tuple[Any, Any]]:
    """Arguments of the operator, document ids, and weights of output and state."""
    tokens = _CHUNKS * kernel_chunk_size(kind.steps) - 1
    heads = _KV_HEADS * kind.group
    virtual = (_ROWS, tokens, kind.steps, _KV_HEADS)
    state = (_ROWS, _KV_HEADS, kind.dim, kind.value_dim)
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    k = draw(*virtual, kind.dim)
    arrays = {
        "q": draw(_ROWS, tokens, heads, kind.dim),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": draw(*virtual, kind.value_dim),
    }
    inputs = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    beta = sigmoid(draw(*virtual, kind.dim) if kind.per_channel else draw(*virtual))
    inputs |= {"beta": beta.astype(jnp.dtype(kind.gate)), "initial_state": draw(*state)}
    if kind.decay:
        inputs["log_decay"] = np.log(sigmoid(draw(_ROWS, tokens, _KV_HEADS) + 3))
    segment_ids = None
    if kind.documents:
        # A document that ends within a chunk, one that extends to the end, padding.
        segment_ids = np.full((_ROWS, tokens), 2, np.int32)
        segment_ids[:, : tokens // 6], segment_ids[0, -tokens // 12 :] = 1, 0
    weights = (draw(_ROWS, tokens, heads, kind.value_dim), draw(*state))
    return inputs, segment_ids, weights


def _largest_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest error of a chunk or row of states, relative to its norm or half the usual norm."""
    axis, parts = (0, _ROWS) if expected.shape[:2] == (_ROWS, _KV_HEADS) else (1, _CHUNKS)
    usual = np.linalg.norm(expected) / np.sqrt(parts)
    pairs = zip(*(np.array_split(x, parts, axis) for x in (got, expected)), strict=True)
    errors = [np.linalg.norm(a - b) / max(np.linalg.norm(b), usual / 2) for a, b in pairs]
    return float(np.max(errors))
