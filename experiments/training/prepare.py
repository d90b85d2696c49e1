"""Prepares a run: loads its model and its data, and claims its output directory."""

import contextlib
from typing import TYPE_CHECKING

import jax.numpy as jnp
from rich.console import Console

from convert import load_pretrained, load_tokenizer
from convert.sources import find_checkpoint
from experiments.data import StreamData, TokenData, load_stream, load_token_data
from experiments.training.best import BEST
from experiments.training.checks import (
    check_output,
    describe_run,
    make_run_mesh,
    resumed_description,
)
from experiments.training.config import FinetuneConfig
from experiments.training.fit_rows import fit_rows
from experiments.training.full_layers import with_chosen_layers
from experiments.training.resume import Resumption
from experiments.training.run import Run
from experiments.training.run_data import check_rows, print_bad_rows
from experiments.training.stage import STAGES
from tptt_jax import CausalLM
from tptt_jax.config import runs_memory
from tptt_jax.processes import failing_together, is_first_process
from tptt_jax.training.checkpoint import remove_checkpoints
from tptt_jax.training.description import Description, write_description

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

_IDLE = (
    "the memory is idle: without a window nothing is ever evicted; give --liza.softmax-window, or "
    "--no-liza to leave it out"
)


def prepare_run(config: FinetuneConfig, console: Console) -> Run:
    """Loads everything, and claims the output directory once all of it is right.

    A dry run claims nothing.

    Raises:
      ValueError: if the output directory holds another run, or anything cannot be read.
    """
    with failing_together():
        mesh = make_run_mesh(config)
    # The choice is computed by all processes.
    config = with_chosen_layers(config, mesh, console)
    with failing_together():
        description = describe_run(config)
        check_output(config, description, resumed_description(config))
        resumption = Resumption(config)
        tokenizer = load_tokenizer(config.model)
        data = _load_data(config, tokenizer, resumption, console)
    model = _load_model(config, mesh)
    _warn_idle_memory(config, model, console)
    with failing_together():
        check_rows(data, model.config, tokenizer)
        rows = fit_rows(
            config,
            model,
            tokenizer,
            resumption.record.seed,
            console,
            resumption.fit_files or resumption.files,
        )
    resumption.hash_base(model)
    run = Run(
        config=config,
        console=console,
        tokenizer=tokenizer,
        data=data,
        fit_rows=rows,
        model=model,
        mesh=mesh,
        resumption=resumption,
    )
    with failing_together():
        resumption.check_loaded(data, rows)
        if not config.dry_run and is_first_process():
            _claim_output(run, description)
    return run


def _load_data(
    config: FinetuneConfig,
    tokenizer: "PreTrainedTokenizerFast",
    resumption: Resumption,
    console: Console,
) -> TokenData | StreamData:
    """Reads or prepares the rows of training and those held out, and says what they are."""
    rows = (config.data, tokenizer, resumption.record.seed)
    files, strict = resumption.files, config.strict
    if config.data.streaming:
        data = load_stream(
            *rows,
            rows_per_step=config.rows_per_step,
            order_seed=config.seed,
            files=files,
            strict=strict,
        )
    else:
        # Recall rows hide things beyond the window.
        window = None if config.memory is None else config.memory.softmax_window
        data = load_token_data(*rows, window=window, files=files, strict=strict)
    console.print(data.describe(config.rows_per_step), markup=False)
    print_bad_rows(data.bad_rows, console)
    return data


def _load_model(config: FinetuneConfig, mesh: "Mesh | None") -> CausalLM:
    # What a run has trained is read and compared by all processes.
    together = contextlib.nullcontext() if find_checkpoint(config.model) else failing_together()
    with together:
        return load_pretrained(
            config.model,
            config.memory,
            config.adapters,
            jnp.dtype(config.dtype),
            base_dtype=config.base_dtype,
            mesh=mesh,
            rules=config.rules,
            seed=config.seed,
        )


def _warn_idle_memory(config: FinetuneConfig, model: CausalLM, console: Console) -> None:
    """Prints a notice if a memory was asked for that no token reaches, ever or in training."""
    memory = config.memory
    if memory is None or memory.writes != "evicted":
        return
    if not runs_memory(model.config, memory):
        console.print(_IDLE)
        return
    window = config.window_range[0] if config.window_range else memory.softmax_window
    longest = config.data.sequence_length
    if config.data.recall:
        longest = max(longest, config.data.recall_row_length)
    if config.steps != 0 and window is not None and longest <= window:
        console.print(
            f"the memory is idle in training: rows of {longest} tokens fit the window of {window}; "
            "give a --data.sequence-length of several windows",
            soft_wrap=True,
        )


def _claim_output(run: Run, description: Description) -> None:
    """Writes what makes the output directory this run's, unless the run is complete."""
    config, output, resumption = run.config, run.config.output, run.resumption
    if run.was_complete:
        done = f"{resumption.step}; --steps {run.steps}"
        early = run.stopped_early and resumption.step != run.steps
        why = f"stopped early ({done})" if early else f"has done all its steps ({done})"
        run.console.print(
            f"the run in {output} {why}: nothing is trained; raise "
            f"{'--early-stop' if early else '--steps'} to continue",
            markup=False,
        )
        return
    if not config.resume:
        for folder in (*STAGES, BEST):
            remove_checkpoints(output / folder)
    if not config.resume or resumption.needs_remeasuring:
        (output / "evaluation.json").unlink(missing_ok=True)
    write_description(output, description)
    resumption.write()
