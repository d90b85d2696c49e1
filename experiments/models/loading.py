"""Loads the model of a command, fine-tuned or not, with any window."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from convert import load_pretrained, load_tokenizer
from convert.bases import has_base
from convert.sources import DEFAULT_MODEL, find_checkpoint
from tptt_jax import CausalLM, LizaConfig, fix_context, warm_up
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.training.base_weights import same_base_weights
from tptt_jax.training.description import Description, is_checkpoint, read_description

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Loaded(NamedTuple):
    """A loaded model with its tokenizer.

    Attributes:
      model: with its adapter and memory.
      tokenizer: that belongs to it.
    """

    model: CausalLM
    tokenizer: "PreTrainedTokenizerFast"


def load_model(
    model: str | None,
    adapter: Path | None,
    *,
    window: int | None = None,
    sinks: int | None = None,
    is_full: bool = False,
    context: int | None = None,
    dtype: jnp.dtype,
    base_dtype: BaseDtype | None = None,
) -> Loaded:
    """Loads a model and its tokenizer in parallel; both take about as long.

    Args:
      model: what `load_pretrained` takes; None: what the adapter was trained on, or
        "smollm2-135m".
      adapter: output directory of a finetune run, or a directory of PEFT's or tptt's.
      window: tokens that softmax attention sees; a base model gets no memory by it. None: what
        the model was trained with.
      sinks: first tokens that always stay visible; None: what the model was trained with.
      is_full: take the window that the model was trained with away; a memory of evicted tokens is
        idle then.
      context: the length in tokens for which rotary frequencies that depend on it are fixed; None:
        they are not.
      dtype: of the weights.
      base_dtype: of the base model's matrices if they are quantised; None: `dtype`.

    Raises:
      ValueError: if the adapter is neither, or the window impossible.
      ConversionError: if the model or its tokenizer cannot be loaded.
    """
    if adapter is not None and not (has_base(adapter) or is_checkpoint(adapter)):
        raise ValueError(
            f"--adapter {adapter} is neither the --output directory of a finetune run "
            "(checkpoint.json) nor a PEFT or tptt directory: name one of these."
        )
    tuned = None if adapter is None or has_base(adapter) else read_description(adapter)
    if tuned is not None:
        source = model or tuned.source
    else:
        source = model or (DEFAULT_MODEL if adapter is None else str(adapter))
    with ThreadPoolExecutor(1) as pool:
        over = None if model is None and tuned is None else adapter
        own = None if tuned is not None else over
        tokenizer = pool.submit(load_tokenizer, source, adapter=own)

        def changed(liza: LizaConfig | None) -> LizaConfig | None:
            if is_full:
                return None if liza is None else dataclasses.replace(liza, softmax_window=None)
            return windowed(liza, window, sinks)

        options: Any = {"dtype": dtype, "base_dtype": base_dtype}
        weights = _load_weights(source, over, tuned, changed, options)
        if context is not None:
            weights = fix_context(weights, context)
        warm_up(weights)
        return Loaded(weights, tokenizer.result())


def windowed(
    liza: LizaConfig | None, window: int | None, sinks: int | None = None
) -> LizaConfig | None:
    """A memory with another window and other sinks; None: its own. A base model gets no memory."""
    if window is not None:
        # None is fitted to a base model.
        liza = dataclasses.replace(liza or LizaConfig(writes="none"), softmax_window=window)
    # Without a window every token stays visible.
    if sinks is None or liza is None or liza.softmax_window is None:
        return liza
    return dataclasses.replace(liza, softmax_sinks=sinks)


def _load_weights(
    source: str,
    adapter: Path | None,
    tuned: Description | None,
    changed: Callable[[LizaConfig | None], LizaConfig | None],
    options: dict[str, Any],
) -> CausalLM:
    """The model with its adapter; `options` are the dtypes, as `load_pretrained` takes them."""
    if tuned is None:
        trained = find_checkpoint(source)
        liza = None if trained is None else trained.liza
        if has_base(adapter or Path(source).expanduser()):
            # The memory of a tptt directory is known only after loading.
            loaded = load_pretrained(source, adapter=adapter, **options)
            if changed(loaded.liza) == loaded.liza:
                return loaded
            liza = loaded.liza
        return load_pretrained(source, changed(liza), adapter=adapter, **options)
    assert adapter is not None, "tuned weights have a directory"
    # Here, as importing orbax takes a quarter of a second.
    from tptt_jax.training.checkpoint import restore_trainable

    loaded = load_pretrained(source, changed(tuned.liza), tuned.lora, **options)
    # Whoever names another base model means it.
    is_own = source == tuned.source
    same = same_base_weights(adapter, loaded, tuned) if is_own else nullcontext()
    with same:
        restore_trainable(adapter, loaded)
    return loaded


def is_tuned(source: str) -> bool:
    """Whether a source is a finetune run or an adapter, not a base model."""
    return find_checkpoint(source) is not None or has_base(Path(source).expanduser())
