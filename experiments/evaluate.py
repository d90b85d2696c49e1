"""``python -m experiments.evaluate``: how good a model is at a task."""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from convert.files import atomic_file
from experiments.arguments import run_configured
from experiments.models import load_model
from experiments.process import prepare_process
from experiments.prompts import document_tokens
from tptt_jax.inference.score import token_losses

_FIRST_EDGE = 1024


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures a base model or a fine-tuned one."""

    model: str | None = None
    """"smollm2-135m" or "gemma3-270m", which come as packages; a Hugging Face directory, a Hub id,
    a .gguf file, a PEFT directory, or a run of experiments.finetune. None: what the adapter was
    trained on, or smollm2-135m."""
    adapter: Path | None = None
    """Output directory of a finetune run: its adapters and its memory. Or a PEFT directory."""
    task: Literal["perplexity-by-position"] = "perplexity-by-position"
    """"perplexity-by-position": of one long text, for tokens up to 1,024, 2,048, 4,096, ...;
    whatever the model was trained on, it is read from the first token to the last."""
    data: Path | None = None
    """UTF-8 text file."""
    tokens: int = 65536
    """How many of its tokens count at most."""
    window: int | None = None
    """Softmax attention sees so many tokens, and the first few. None: what the model was
    trained with."""
    sinks: int | None = None
    """First tokens that a window goes on seeing. None: what the model was trained with, or 4."""
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave the memory out; a window stays."""
    output: Path | None = None
    """File for the result as JSON."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and activations."""

    def __post_init__(self) -> None:
        """Rejects what nothing can be measured with."""
        if self.data is None:
            raise ValueError("perplexity-by-position needs a text: give --data FILE.")
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.tokens}.")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Loads, measures, prints; returns what --json prints."""
    prepare_process()
    assert config.data is not None
    model, tokenizer, source = load_model(
        config.model,
        config.adapter,
        window=config.window,
        sinks=config.sinks,
        dtype=jnp.dtype(config.dtype),
    )
    pieces = _first(document_tokens(tokenizer, config.data), config.tokens)
    use_memory = model.liza is not None and not config.no_liza
    losses = np.concatenate(list(token_losses(model, pieces, use_memory=use_memory)) or [[]])
    if not len(losses):
        raise ValueError(f"{config.data} has fewer than two tokens: nothing can be predicted.")
    result = {
        "task": config.task,
        "model": source,
        "window": config.window,
        "memory": use_memory,
        "tokens": len(losses),
        "perplexity": _perplexity(losses),
        "by_position": perplexity_by_position(losses),
    }
    for part in result["by_position"]:
        print(f"{part['from']:>9,} - {part['to']:>9,}: {part['perplexity']:.3f}")
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(config.output) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def perplexity_by_position(losses: np.ndarray) -> list[dict[str, Any]]:
    """Perplexity between positions 0, 1,024, 2,048, 4,096, ...

    Args:
      losses: nats of the tokens from position 1 on [L].

    Returns:
      One entry an interval: from (inclusive), to (exclusive), perplexity.
    """
    edges = [0, *itertools.takewhile(lambda e: e <= len(losses), _doubling()), len(losses) + 1]
    return [
        {"from": a, "to": b, "perplexity": _perplexity(losses[max(a - 1, 0) : b - 1])}
        for a, b in itertools.pairwise(edges)
        if b - 1 > max(a - 1, 0)
    ]


def _doubling() -> Iterator[int]:
    edge = _FIRST_EDGE
    while True:
        yield edge
        edge *= 2


def _perplexity(losses: np.ndarray) -> float:
    return math.exp(min(float(np.mean(losses, dtype=np.float64)), 700.0))


def _first(pieces: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return


def main() -> None:
    """The command."""
    sys.exit(run_configured(evaluate, EvaluateConfig, prog="python -m experiments.evaluate"))


if __name__ == "__main__":
    main()
