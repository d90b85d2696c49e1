"""The contract of streaming models, as checks that tests share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax import CausalLM
from tptt_jax.layers.gates import MassGate, MemoryGate
from tptt_jax.model import MagShare, init_cache

# Tests compile far longer than they run.
QUICK: dict[str, Any] = {"compiler_options": {"xla_backend_optimization_level": 0}}
if jax.__version__.startswith("0.10."):
    # Later releases refuse options that they no longer know.
    QUICK["compiler_options"]["xla_cpu_use_fusion_emitters"] = False
PIECE = 5


def quick_jit(function: Callable, **options: Any) -> Callable:
    """jax.jit that saves on optimisation; nnx modules may not be arguments."""
    return jax.jit(function, **QUICK, **options)


@functools.partial(quick_jit, static_argnums=(0, 1))
def _call(
    graphdef: nnx.GraphDef, options: tuple, state: nnx.State, args: tuple, named: dict
) -> Any:
    return nnx.merge(graphdef, state)(*args, **named, **dict(options))


def jitted(model: nnx.Module, **options: Any) -> Callable:
    """The model's call with fixed options; models of one structure share their programs."""
    graphdef, state = nnx.split(model)
    fixed = tuple(sorted(options.items()))

    def call(*args: Any, **named: Any) -> Any:
        # None is what every argument is unless given; programs tell the two apart.
        while args and args[-1] is None:
            args = args[:-1]
        given = {name: value for name, value in named.items() if value is not None}
        return _call(graphdef, fixed, state, args, given)

    return call


def logits_of(model: CausalLM, tokens: Any, **options: Any) -> np.ndarray:
    """Logits [B, T, V] of whole rows."""
    return np.asarray(jitted(model, **options)(jnp.asarray(tokens)).logits)


def randomize(module: nnx.Module, seed: int = 1) -> Any:
    """Moves every parameter away from its start, so that adapters, biases and norms matter.

    Not farther: a network of larger random weights magnifies rounding, which differs between
    processors, to the size of the bounds.
    """
    rng = np.random.default_rng(seed)

    def move(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        noise = (0.1 * rng.standard_normal(value.shape)).astype(value.dtype)
        if isinstance(variable, MagShare):
            return variable
        # In NumPy, which compiles nothing.
        return variable.replace(jax.device_put(np.asarray(value) + noise, value.sharding))

    state = jax.tree.map(move, nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable))
    nnx.update(module, state)
    return module


def raise_shares(module: nnx.Module, by: float = 4.0) -> Any:
    """Gives mass gates, whose shares start near 0, a share behind which no error can hide.

    And a limit that short rows reach.
    """
    for _, gate in nnx.iter_modules(module):
        if isinstance(gate, MassGate):
            gate.bias[...] = gate.bias[...] + by
            gate.limit[...] = jnp.full_like(gate.limit[...], np.log(5.0))
    return module


def remove_shares(module: nnx.Module) -> Any:
    """Gives the memory no share, in the same programs; with `use_memory=False` it has others."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, MassGate):
            part.bias[...] = jnp.full_like(part.bias[...], -1e9)
        elif isinstance(part, MemoryGate):
            part.logit[...] = jnp.full_like(part.logit[...], -1e9)
        elif isinstance(part, CausalLM) and part.mag_share is not None:
            part.mag_share[...] = jnp.zeros_like(part.mag_share[...])
    return module


def random_tokens(shape: tuple[int, ...], seed: int = 0, vocab_size: int = 97) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def relative_error(got: Any, want: Any) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.size:
        return 0.0
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def assert_close(got: Any, want: Any, tolerance: float, what: str) -> None:
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def assert_trees_close(got: Any, want: Any, tolerance: float, what: str) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, tolerance, what + jax.tree_util.keystr(path))


def verify_streaming_contract(
    model: CausalLM, tokens: np.ndarray, *, tolerance: float = 1e-5, seed: int = 0
) -> np.ndarray:
    """Checks that neither splits nor padding nor packing change what a model computes.

    The reference is one call with whole rows [B, T] and without segment_ids, B >= 2, T >= 12.
    Errors are relative to the largest logit. Returns the reference, for checks of one's own.
    """
    call = jitted(model)

    def run(tokens: np.ndarray, ids: Any = None, cache: Any = None) -> tuple[np.ndarray, Any]:
        output = call(tokens, ids, cache=cache)
        return np.asarray(output.logits), output.cache

    whole, _ = run(tokens)
    assert np.isfinite(whole).all()
    empty = init_cache(model, *tokens.shape)
    final = _verify_one_by_one(run, tokens, whole, empty, tolerance)
    rng = np.random.default_rng(seed)
    for name, counts in _splits(tokens.shape, rng).items():
        logits, cache = _run_pieces(run, tokens, counts, empty, rng)
        assert_close(logits, whole, tolerance, f"{name}: logits")
        assert_trees_close(cache, final, tolerance, f"{name}: cache")
    _verify_rows(run, tokens, whole, rng, tolerance)
    return whole


def _verify_one_by_one(
    run: Callable, tokens: np.ndarray, whole: np.ndarray, cache: Any, tolerance: float
) -> Any:
    logits = []
    for t in range(tokens.shape[1]):
        out, cache = run(tokens[:, t : t + 1], cache=cache)
        logits.append(out)
    assert_close(np.concatenate(logits, 1), whole, tolerance, "token by token: logits")
    return cache


def _splits(shape: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens of every row in every call [calls, B], at most PIECE."""
    rows, length = shape
    even = np.full(-(-length // PIECE), PIECE)
    even[-1] = length - even[:-1].sum()
    # Rows that wait while others go on, as in a batch of prompts of many lengths.
    ragged = []
    left = np.full(rows, length)
    while left.any():
        ragged.append(np.minimum(rng.integers(0, PIECE + 1, rows), left))
        left = left - ragged[-1]
    return {
        "even pieces": np.tile(even[:, None], (1, rows)),
        "ragged pieces with padding": np.array(ragged),
    }


def _run_pieces(
    run: Callable, tokens: np.ndarray, counts: np.ndarray, cache: Any, rng: np.random.Generator
) -> tuple[np.ndarray, Any]:
    """Feeds calls of width PIECE whose padding stands anywhere and holds any token."""
    rows, length = tokens.shape
    logits, done = [[] for _ in range(rows)], np.zeros(rows, int)
    for count in counts:
        piece, ids = random_tokens((rows, PIECE), int(rng.integers(99))), []
        for row in range(rows):
            places = np.sort(rng.permutation(PIECE)[: count[row]])
            piece[row, places] = tokens[row, done[row] : done[row] + count[row]]
            ids.append(np.isin(np.arange(PIECE), places).astype(np.int32))
        out, cache = run(piece, np.array(ids), cache)
        for row in range(rows):
            logits[row].append(out[row, ids[row] != 0])
        done += count
    assert (done == length).all()
    np.testing.assert_array_equal(cache.length, done)
    return np.array([np.concatenate(row) for row in logits]), cache


def _verify_rows(
    run: Callable,
    tokens: np.ndarray,
    whole: np.ndarray,
    rng: np.random.Generator,
    tolerance: float,
) -> None:
    """Padding and packing without a cache; all layouts are rows of one call."""
    length = tokens.shape[1]
    middle = np.sort(rng.permutation(length + 4)[:length])
    # (document's row, places it stands at, its id); a document is a prefix of its row.
    layouts: dict[str, Sequence[tuple[int, np.ndarray, int]]] = {
        "padding left": [(0, np.arange(4, length + 4), 1)],
        "padding right": [(0, np.arange(length), 3)],
        "padding in the middle": [(1, middle, 1)],
        "packed": [
            (0, np.arange(5), 1),
            (1, np.arange(5, 6), 2),
            (1, np.arange(6, length - 2), 3),
            (0, np.arange(length - 2, length + 4), 4),
        ],
        "packed with padding": [
            (1, np.array([1, 2, 4]), 7),
            (0, np.array([5, 6, 7, 9, 10]), 2),
            (1, np.arange(12, length + 3), 9),
        ],
    }
    packed = random_tokens((len(layouts), length + 4), int(rng.integers(99)))
    ids = np.zeros_like(packed)
    for row, documents in enumerate(layouts.values()):
        for source, places, number in documents:
            packed[row, places] = tokens[source, : len(places)]
            ids[row, places] = number
    logits, _ = run(packed, ids)
    assert np.isfinite(logits).all()
    for row, (name, documents) in enumerate(layouts.items()):
        for source, places, number in documents:
            want = whole[source, : len(places)]
            assert_close(logits[row, places], want, tolerance, f"{name}, document {number}")
