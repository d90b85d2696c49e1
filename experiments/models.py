"""Loading the model that a command is asked to run, fine-tuned or not, with another window."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from convert import load_pretrained
from convert.sources import find_checkpoint
from tptt_jax import CausalLM, LizaConfig
from tptt_jax.training.checkpoint import read_description, restore_trainable


def load_model(
    model: str | None,
    adapter: Path | None,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: jnp.dtype,
) -> tuple[CausalLM, str]:
    """The model, and where its tokenizer comes from.

    Args:
      model: what `load_pretrained` takes; None: what the adapter was trained on, or "demo".
      adapter: output directory of a finetune run.
      window: tokens that softmax attention sees; a base model becomes a Titan by it. None: what
        the model was trained with.
      sinks: first tokens that a window goes on seeing; None: what the model was trained with.
      dtype: of the weights.

    Raises:
      ValueError: if the adapter is no run, or the window impossible.
      ConversionError: if the model cannot be loaded.
    """
    described = None if adapter is None else read_description(adapter)
    source = model or ("demo" if described is None else described.source)
    trained = find_checkpoint(source) if described is None else described
    liza = None if trained is None else trained.liza
    if window is not None:
        liza = dataclasses.replace(liza or LizaConfig(), softmax_window=window)
        if sinks is not None:
            liza = dataclasses.replace(liza, softmax_sinks=sinks)
    if described is None or adapter is None:
        return load_pretrained(source, liza, dtype=dtype), source
    loaded = load_pretrained(source, liza, described.lora, dtype)
    restore_trainable(adapter, loaded)
    return loaded, source
