"""Rows that reach beyond the window: what a memory is fitted on."""

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.data import TokenBatchSource, load_token_data
from experiments.data.data_files import FoundData, find_data
from experiments.data.stream_loading import sample_rows
from experiments.models.limits import check_lengths, check_tokens
from experiments.training.config import FinetuneConfig
from experiments.training.run_data import print_bad_rows
from tptt_jax import CausalLM, ModelConfig
from tptt_jax.config import runs_memory

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

# Of streamed data; a fit takes a few hundred rows.
_STREAMED_EXAMPLES = 2000


def fit_rows(
    config: FinetuneConfig,
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    console: Console,
    files: FoundData | None = None,
) -> TokenBatchSource | None:
    """The rows to fit the memory of a run on; None: it is not fitted.

    Arguments as those of `long_rows`.
    """
    liza = config.memory
    if liza is None or liza.writes != "evicted" or not runs_memory(model.config, liza):
        return None
    if not config.fit.has_steps:
        return None
    return long_rows(config, model.config, tokenizer, seed, console, files)


def long_rows(
    config: FinetuneConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    console: Console,
    files: FoundData | None = None,
) -> TokenBatchSource:
    """Rows of --fit-length tokens of --fit-data, whatever the steps of the fit.

    Args:
      config: of the run; it has a window.
      model: of the base model.
      tokenizer: of the model.
      seed: the one that chose the held-out rows.
      console: for the rows that cannot be read and are left out.
      files: the files of these rows, from `find_data`; None: they are searched.

    Raises:
      ValueError: if they are not longer than the window, or the model cannot read them.
    """
    window = config.liza.softmax_window
    assert window is not None
    length = config.fit.row_length(window, config.data.sequence_length)
    # A fit trains the memory alone in any case.
    changes: dict[str, Any] = {"sequence_length": length, "loss": "all"}
    changes |= {"recall_trains": "all", "recall_length": None}
    if config.fit.data is None:
        data = dataclasses.replace(config.data, **changes)
    else:
        data = config.data.of_other(config.fit.data, **changes)
    if data.streaming:
        rows, bad_rows = sample_rows(
            data, tokenizer, seed, _STREAMED_EXAMPLES, files, strict=config.strict
        )
    else:
        files = files or find_data(data.path, data.split, data.revision, leave_out=config.output)
        loaded = load_token_data(
            data, tokenizer, seed, window=window, files=files, strict=config.strict
        )
        rows = loaded.train
        # Those of the training data are named when that is loaded.
        bad_rows = () if config.fit.data is None else loaded.bad_rows
    if bad_rows:
        console.print(f"{len(bad_rows):,} bad rows left out of those to fit on", markup=False)
        print_bad_rows(bad_rows, console)
    check_lengths(rows.segment_ids, model, "fit: length")
    check_tokens(rows.tokens, model.vocab_size, tokenizer)
    return rows
