"""Checks that splits, padding and packing do not change a model's logits.

The reference is one call with whole rows. Every check returns the largest difference from it,
relative to the largest logit; NaN or Inf in either makes it NaN.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx

from tptt_jax import CausalLM, fix_context, init_cache

_PIECE = 7
_PADDING = 4


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of `expected`."""
    difference = np.abs(got.astype(np.float64) - expected).max()
    return float(difference / max(np.abs(expected.astype(np.float64)).max(), 1e-30))


@functools.partial(jax.jit, static_argnames="graphdef")
def _call(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Any, ids: Any, cache: Any
) -> tuple[Any, Any]:
    output = nnx.merge(graphdef, state)(tokens, ids, cache=cache)
    return output.logits, output.cache


class Runner:
    """A model, its text and the logits of the text in one call."""

    def __init__(self, model: CausalLM, tokens: np.ndarray):
        """Runs nothing yet.

        Args:
          model: the model.
          tokens: [2, T] int32.
        """
        # Frequencies of the whole text, as in transformers; a cache needs fixed ones.
        model = fix_context(model, tokens.shape[1])
        self._graphdef, self._state = nnx.split(model)
        self.model, self.tokens = model, tokens
        self.empty = init_cache(model, *tokens.shape)
        self._whole: np.ndarray | None = None

    def __call__(
        self, tokens: np.ndarray, ids: np.ndarray | None = None, cache: Any = None
    ) -> tuple[np.ndarray, Any]:
        """Logits [B, T, V] in float32, and the new cache."""
        logits, cache = _call(self._graphdef, self._state, tokens, ids, cache)
        return np.asarray(logits, np.float32), cache

    @property
    def whole(self) -> np.ndarray:
        """Logits [2, T, V] of the whole text."""
        if self._whole is None:
            self._whole = self(self.tokens)[0]
        return self._whole


def _token_by_token(run: Runner) -> float:
    logits, cache = [], run.empty
    for t in range(run.tokens.shape[1]):
        out, cache = run(run.tokens[:, t : t + 1], cache=cache)
        logits.append(out)
    return relative_error(np.concatenate(logits, 1), run.whole)


def _segments(run: Runner) -> float:
    """Pieces of equal length; the last one is padded."""
    length = run.tokens.shape[1]
    logits, cache = [], run.empty
    for begin in range(0, length, _PIECE):
        piece = np.zeros((2, _PIECE), np.int32)
        count = min(_PIECE, length - begin)
        piece[:, :count] = run.tokens[:, begin : begin + count]
        ids = np.tile(np.arange(_PIECE) < count, (2, 1)).astype(np.int32)
        out, cache = run(piece, ids, cache)
        logits.append(out[:, :count])
    return relative_error(np.concatenate(logits, 1), run.whole)


def _ragged_segments(run: Runner) -> float:
    """Rows that advance at different speeds, with arbitrary padding tokens at any place."""
    rng = np.random.default_rng(0)
    length = run.tokens.shape[1]
    logits, done, cache = [[], []], [0, 0], run.empty
    while min(done) < length:
        piece = rng.integers(0, run.tokens.max() + 1, (2, _PIECE), dtype=np.int32)
        ids = np.zeros_like(piece)
        for row in range(2):
            count = min(int(rng.integers(0, _PIECE + 1)), length - done[row])
            places = np.sort(rng.permutation(_PIECE)[:count])
            piece[row, places] = run.tokens[row, done[row] : done[row] + count]
            ids[row, places] = 1
            done[row] += count
        out, cache = run(piece, ids, cache)
        for row in range(2):
            logits[row].append(out[row, ids[row] != 0])
    return relative_error(np.stack([np.concatenate(row) for row in logits]), run.whole)


def _rows(run: Runner, layouts: list[list[tuple[int, np.ndarray, int]]]) -> float:
    """Runs rows of documents: (row of which it is a prefix, its places, its id)."""
    rng = np.random.default_rng(1)
    width = run.tokens.shape[1] + _PADDING
    packed = rng.integers(0, run.tokens.max() + 1, (len(layouts), width), dtype=np.int32)
    ids = np.zeros_like(packed)
    for row, documents in enumerate(layouts):
        for source, places, number in documents:
            packed[row, places] = run.tokens[source, : len(places)]
            ids[row, places] = number
    logits, _ = run(packed, ids)
    pairs = [
        (logits[row, places], run.whole[source, : len(places)])
        for row, documents in enumerate(layouts)
        for source, places, _ in documents
    ]
    got, expected = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return relative_error(got, expected)


def _padding(run: Runner) -> float:
    length = run.tokens.shape[1]
    middle = np.sort(np.random.default_rng(2).permutation(length + _PADDING)[:length])
    left, right = np.arange(_PADDING, length + _PADDING), np.arange(length)
    return _rows(run, [[(0, left, 1)], [(1, right, 3)], [(0, middle, 1)]])


def _packing(run: Runner) -> float:
    width = run.tokens.shape[1] + _PADDING
    return _rows(
        run,
        [
            [(0, np.arange(5), 1), (1, np.arange(5, 6), 2), (1, np.arange(6, width), 3)],
            [(1, np.array([1, 2, 4]), 7), (0, np.array([5, 6, 8]), 2)],
            [(1, np.arange(width // 2), 4), (0, np.arange(width // 2, width - 1), 9)],
        ],
    )


STREAMING_CHECKS: Mapping[str, Callable[[Runner], float]] = MappingProxyType(
    {
        "token by token": _token_by_token,
        "segments": _segments,
        "ragged segments": _ragged_segments,
        "padding": _padding,
        "packing": _packing,
    }
)
"""Checks by their names in reports."""
