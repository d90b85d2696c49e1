"""Speed and memory of decoding as the context grows; `experiments.bench context` runs it."""

import json
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.files import atomic_file
from tptt_jax import CausalLM
from tptt_jax.array_typing import Int
from tptt_jax.inference.generate import Stops, stream
from tptt_jax.inference.prefill import CALL_TOKENS, SEGMENT_TOKENS, read
from tptt_jax.inference.state import ReadState, grow_state, init_state

if TYPE_CHECKING:  # matplotlib takes seconds to import
    from matplotlib.axes import Axes

_BLOCK = 16
_COLORS = ("#08519c", "#d94801", "#636363", "#31a354")


def resident_gb() -> float:
    """Memory the process holds now, in GB of 1e9 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def measure_contexts(
    model: CausalLM,
    tokens: Int[np.ndarray, " L"],
    contexts: Sequence[int],
    *,
    new_tokens: int,
    read_limit: int,
    use_memory: bool,
) -> list[dict[str, Any]]:
    """Reads on from context to context, and decodes at each.

    Args:
      model: a base model or a Titan.
      tokens: the text, as long as the longest context.
      contexts: lengths, ascending.
      new_tokens: decoded at the end of each; the first two blocks do not count.
      read_limit: beyond it the text is not read and the caches of layers without a window are
        taken as they are: decoding takes as long whatever they hold.
      use_memory: False leaves the memory out.

    Returns:
      For each context: seconds per token of prefill (None beyond the limit) and decoding,
      bytes of state, resident memory.
    """
    state, length, results = None, 0, []
    for context in contexts:
        # The decoded tokens are the last of the context.
        end, seconds = context - new_tokens, None
        if context <= read_limit:
            _compile_reading(model, tokens, context, use_memory)
            start = time.perf_counter()
            for first in range(length, end, CALL_TOKENS):
                piece = tokens[None, first : min(first + CALL_TOKENS, end)]
                state = read(model, piece, state=state, use_memory=use_memory)
            jax.block_until_ready(state)
            seconds = (time.perf_counter() - start) / (end - length)
        else:
            state = _of_length(model, state, end, use_memory)
        length = end
        assert state is not None
        results.append(
            {
                "context": context,
                "prefill_s_per_token": seconds,
                "decode_s_per_token": _decode_seconds(model, state, new_tokens),
                "state_bytes": state.num_bytes,
                "resident_gb": resident_gb(),
            }
        )
    return results


def _decode_seconds(model: CausalLM, state: ReadState, new_tokens: int) -> float:
    """Median over blocks of the time per token."""
    start, seconds = time.perf_counter(), []
    blocks = stream(
        model,
        np.zeros((1, 0), np.int32),
        new_tokens,
        stops=Stops(tokens=()),
        state=state,
        use_memory=state.has_memory,
        block=_BLOCK,
    )
    for block in blocks:
        now = time.perf_counter()
        seconds.append((now - start) / block.shape[1])
        start = now
    return statistics.median(seconds[2:])


def _compile_reading(
    model: CausalLM, tokens: Int[np.ndarray, " L"], context: int, use_memory: bool
) -> None:
    """Reads one segment and a bit with caches as large as the context needs."""
    state = grow_state(model, init_state(model, 1, use_memory=use_memory), context)
    few = np.resize(tokens, (1, SEGMENT_TOKENS + 1))
    jax.block_until_ready(read(model, few, state=state, use_memory=use_memory))


def _of_length(
    model: CausalLM, state: ReadState | None, length: int, use_memory: bool
) -> ReadState:
    """A state that takes itself to be so long."""
    if state is None:
        state = init_state(model, 1, length, use_memory=use_memory)
    state = grow_state(model, state, length)
    cache = state.cache._replace(length=jnp.full_like(state.cache.length, length))
    return state._replace(cache=cache)


def write_context_report(
    output: Path, runs: dict[str, list[dict[str, Any]]], about: dict[str, Any]
) -> dict[str, Any]:
    """Writes context.json and context.png into a directory, and returns what is in the former."""
    output.mkdir(parents=True, exist_ok=True)
    written = about | {"runs": runs}
    with atomic_file(output / "context.json") as path:
        path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    _plot(output / "context.png", runs, str(about["model"]))
    return written


def read_peer(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What another program has measured, in the form of "runs" in context.json.

    Raises:
      ValueError: if the file has another form.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for name, results in runs.items():
            for result in results:
                if not {"context", "decode_s_per_token"} <= result.keys():
                    raise ValueError(f"{name} lacks context or decode_s_per_token")
        return runs
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"runs": {name: [{"context": ..., "decode_s_per_token": ...}, ...]}}'
        raise ValueError(f"{path} must hold {form}, as context.json does: {error}.") from None


def _plot(path: Path, runs: dict[str, list[dict[str, Any]]], model: str) -> None:
    from matplotlib.figure import Figure

    panels = (
        ("decode_s_per_token", "decoding, ms per token", 1e3),
        ("prefill_s_per_token", "prefill, ms per token", 1e3),
        ("state_bytes", "state, MB", 1e-6),
    )
    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
    for axis, (key, label, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for (name, results), color in zip(runs.items(), _COLORS * len(runs), strict=False):
            _draw(axis, results, key, scale, name, color)
        axis.set_xscale("log", base=2)
        lengths = sorted({result["context"] for results in runs.values() for result in results})
        axis.set_xticks(lengths, [_short(length) for length in lengths])
        # From zero: a flat line should look flat.
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context, tokens")
        axis.set_title(label, loc="left", fontsize=10)
        axis.grid(visible=True, color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(model, x=0.01, ha="left", fontweight="bold")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(
    axis: "Axes", results: list[dict[str, Any]], key: str, scale: float, name: str, color: str
) -> None:
    points = [(r["context"], r[key] * scale) for r in results if r.get(key) is not None]
    if points:
        # See-through, as two programs may hold the same number of bytes.
        axis.plot(*zip(*points, strict=True), "o-", color=color, label=name, alpha=0.7)


def _short(length: int) -> str:
    """1024 as 1k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
