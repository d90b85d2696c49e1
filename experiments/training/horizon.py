"""--horizon-auto: the longest row that the memory of a run meets, chosen once and written down."""

import dataclasses

from convert.sources import find_checkpoint
from experiments.training.config import FinetuneConfig
from tptt_jax.training.description import Description


def with_horizon(config: FinetuneConfig, written: Description | None) -> FinetuneConfig:
    """The configuration with the horizon of its memory, if that is to be chosen.

    A resumed run keeps what it has. A memory that another run has fitted keeps at least its own.

    Args:
      config: of the run.
      written: of the run that the output directory holds, from `resumed_description`.

    Raises:
      ValueError: if rows are too short for anything to leave the window.
    """
    memory = config.memory
    if not config.horizon_auto or memory is None or memory.horizon is not None:
        return config
    forgets = memory.writes == "evicted" and memory.alpha_gate != "constant"
    if not forgets or memory.softmax_window is None:
        return config
    if written is None:
        horizon = _longest_row(config, memory.softmax_window)
    else:
        horizon = None if written.liza is None else written.liza.horizon
    liza = dataclasses.replace(config.liza, horizon=horizon)
    return dataclasses.replace(config, liza=liza, horizon_auto=False)


def _longest_row(config: FinetuneConfig, window: int) -> int | None:
    """Tokens of the longest row of fit and training; None: there is none."""
    lengths = []
    if config.fit.has_steps:
        lengths.append(config.fit.row_length(window, config.data.sequence_length))
    if config.steps != 0:
        lengths.append(config.data.sequence_length)
    if config.asked_batches:
        lengths.append(config.data.recall_row_length)
    earlier = find_checkpoint(config.model)
    if earlier is not None and earlier.liza is not None and earlier.liza.horizon is not None:
        lengths.append(earlier.liza.horizon)
    return max(lengths, default=None)
