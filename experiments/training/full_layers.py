"""--full-layers-auto: the layers that keep full attention, chosen once and then written down."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from rich.console import Console

from convert import load_pretrained, load_tokenizer
from convert.sources import find_checkpoint
from experiments.data import TokenBatchSource
from experiments.training.config import FinetuneConfig
from experiments.training.fit_rows import long_rows
from tptt_jax import CausalLM, LizaConfig
from tptt_jax.processes import failing_together
from tptt_jax.training.description import Description
from tptt_jax.training.layer_gaps import choose_full_layers, layer_gaps

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Rows that the choice is made on, one at a time.
_ROWS = 8


def with_written_layers(config: FinetuneConfig, written: Description | None) -> FinetuneConfig:
    """The configuration with the full layers of the run that it resumes, if any.

    Args:
      config: of the run.
      written: of the run that the output directory holds, from `resumed_description`.

    Raises:
      ValueError: if that run has another number of them than are to be chosen.
    """
    count = config.full_layers_auto
    if not count or written is None:
        return config
    layers = () if written.liza is None else written.liza.full_layers
    if len(layers) != count:
        have = f"full layers {_listed(layers)}" if layers else "no full layers"
        raise ValueError(
            f"{config.output} holds a run with {have}, where --full-layers-auto {count} asks for "
            f"{count}: give what it has, use another --output, or --no-resume to start again."
        )
    return _with_layers(config, layers)


def with_chosen_layers(
    config: FinetuneConfig, mesh: "Mesh | None", console: Console
) -> FinetuneConfig:
    """The layers whose output the window changes most, as plain indices; printed in one line.

    They are chosen on a few of the rows that a memory is fitted on, see `layer_gaps`.

    Raises:
      ValueError: if the model has too few layers, or is one whose memory has been chosen already.
    """
    if not config.full_layers_auto:
        return config
    with failing_together():
        model, rows = _load(config, mesh, console)
    count = min(_ROWS, rows.num_rows)
    batches = (rows.batch_at(number, 1, config.seed) for number in range(count))
    read = ((jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)) for batch in batches)
    gaps = layer_gaps(model, read)
    with failing_together():
        chosen = choose_full_layers(gaps, config.full_layers_auto)
    window = config.liza.softmax_window
    assert window is not None, "the configuration asks for one"
    console.print(_describe(gaps, chosen, window))
    return _with_layers(config, chosen)


def _load(
    config: FinetuneConfig, mesh: "Mesh | None", console: Console
) -> tuple[CausalLM, TokenBatchSource]:
    """The base model behind a window without a memory, and rows that reach beyond it."""
    if find_checkpoint(config.model):
        raise ValueError(
            f"--full-layers-auto chooses among the layers of a base model, but {config.model} is a "
            "run with a memory in its layers: leave it out, or name the base model."
        )
    liza = config.liza
    alone = LizaConfig(
        writes="none", softmax_window=liza.softmax_window, softmax_sinks=liza.softmax_sinks
    )
    options: Any = {"base_dtype": config.base_dtype, "mesh": mesh, "rules": config.rules}
    model = load_pretrained(config.model, alone, None, jnp.dtype(config.dtype), **options)
    tokenizer = load_tokenizer(config.model)
    return model, long_rows(config, model.config, tokenizer, config.seed, console)


def _with_layers(config: FinetuneConfig, layers: tuple[int, ...]) -> FinetuneConfig:
    liza = dataclasses.replace(config.liza, full_layers=layers)
    return dataclasses.replace(config, liza=liza, full_layers_auto=0)


def _describe(gaps: Mapping[int, float], chosen: tuple[int, ...], window: int) -> str:
    shares = ", ".join(f"{gaps[layer]:.1%}" for layer in chosen)
    most = max(gap for layer, gap in gaps.items() if layer not in chosen)
    return (
        f"full attention stays in layers {_listed(chosen)}: the window of {window} throws their "
        f"output off by {shares} of the residual stream, others by {most:.1%} at most"
    )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
