"""Rows that reach beyond the window: what a memory is fitted on."""

import dataclasses
from typing import TYPE_CHECKING, Any

from experiments.data import TokenBatchSource, load_token_data
from experiments.models.limits import check_lengths, check_tokens
from experiments.training.config import FinetuneConfig
from tptt_jax import CausalLM, ModelConfig
from tptt_jax.config import runs_memory

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


def fit_rows(
    config: FinetuneConfig, model: CausalLM, tokenizer: "PreTrainedTokenizerFast", seed: int
) -> TokenBatchSource | None:
    """The rows that the memory of a run is fitted on; None: it is not fitted."""
    liza = config.memory
    if liza is None or liza.writes != "evicted" or not runs_memory(model.config, liza):
        return None
    if config.fit.steps == 0 and not config.fit.distill_steps:
        return None
    return long_rows(config, model.config, tokenizer, seed)


def long_rows(
    config: FinetuneConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
) -> TokenBatchSource:
    """Rows of --fit-length tokens of --fit-data, whatever the steps of the fit.

    Args:
      config: of the run; it has a window.
      model: of the base model.
      tokenizer: that belongs to it.
      seed: that chose which rows are held out.

    Raises:
      ValueError: if they are not longer than the window, or the model cannot read them.
    """
    window = config.liza.softmax_window
    assert window is not None
    length = config.fit.row_length(window, config.data.sequence_length)
    changes: dict[str, Any] = {"sequence_length": length, "loss": "all"}
    if config.fit.data is not None:
        # What --data.* says of the training data says nothing of other data.
        changes |= {"path": config.fit.data, "columns": (), "revision": None, "format": "auto"}
        changes |= {"text_column": "text", "split": "train", "max_rows": None}
    data = dataclasses.replace(config.data, **changes)
    rows = load_token_data(data, tokenizer, seed, window=window, leave_out=config.output).train
    check_tokens(rows.tokens, model.vocab_size, tokenizer)
    check_lengths(rows.segment_ids, model, "fit: length")
    return rows
