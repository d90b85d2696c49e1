"""What a run would train, and the memory that it would take."""

from collections.abc import Iterable
from typing import Any

import jax
from rich.table import Table

from convert.command_line import readable_size
from experiments.training.run import Run
from experiments.training.text_training import training_parts
from tptt_jax import state_bytes
from tptt_jax.layers.quantized import count_parameters


def dry_run(run: Run) -> dict[str, Any]:
    """Compiles a step of training without running it; prints its costs, and returns them.

    Args:
      run: prepared; nothing of it is changed.

    Returns:
      Bytes as --json prints them: `base_bytes` of the weights that stay as they are,
      `trainable_bytes` and `optimizer_bytes` of float32 parameters and their moments, `step_bytes`
      of what one step holds besides (activations, gradients, buffers), as the compiler plans it for
      one device, and `state_bytes_per_sequence` of decoding.
    """
    partition, state, step = training_parts(run)
    frozen = jax.tree.leaves(partition.frozen)
    arguments, tokens = run.batches.batch_at(0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, partition.frozen, *arguments).compile()
    analysis = compiled.memory_analysis()
    liza = run.model.liza
    length = run.config.data.sequence_length
    sizes = {
        "base_bytes": _bytes(frozen),
        "trainable_bytes": _bytes(state.trainable.values()),
        "optimizer_bytes": _bytes(jax.tree.leaves(state.opt_state)),
        "step_bytes": None if analysis is None else int(analysis.temp_size_in_bytes),
        "state_bytes_per_sequence": state_bytes(
            run.model.config, liza, max_tokens=length, dtype=run.model.dtype
        ),
    }
    counts = {
        "base_parameters": count_parameters(run.model, frozen),
        "trainable_parameters": _count(state.trainable.values()),
    }
    rows = run.config.rows_per_step
    schedule = {
        "steps": run.steps,
        "rows_per_step": rows,
        "rows_for_the_memory_per_step": run.config.asked_rows_per_step,
        "tokens_in_first_step": tokens,
        "epochs": run.steps * rows / run.data.train.num_rows if run.data.train.num_rows else None,
    }
    report = {"dry_run": True} | counts | sizes | schedule
    run.console.print(_table(run, report))
    run.console.print("nothing was trained or written", markup=False)
    return report


def _table(run: Run, report: dict[str, Any]) -> Table:
    config = run.config
    table = Table(title=f"{config.model}, --train {config.train}", title_justify="left")
    for name in ("", "parameters", "memory"):
        table.add_column(name, justify="left" if not name else "right")

    def add(label: str, size: int | None, count: int | None = None) -> None:
        shown = "unknown" if size is None else readable_size(size)
        table.add_row(label, "" if count is None else f"{count:,}", shown)

    kind = config.dtype if config.base_dtype is None else f"{config.base_dtype}, {config.dtype}"
    add(f"frozen weights ({kind})", report["base_bytes"], report["base_parameters"])
    add("trained (float32)", report["trainable_bytes"], report["trainable_parameters"])
    add("optimizer", report["optimizer_bytes"])
    lengths = [config.data.sequence_length]
    if config.asked_batches:
        lengths.append(config.data.recall_row_length)
    shape = f"{config.batch_size} x {max(lengths)} tokens"
    add(f"a step besides: {shape} at a time", report["step_bytes"])
    names = ("base_bytes", "trainable_bytes", "optimizer_bytes", "step_bytes")
    known = [report[name] for name in names if report[name] is not None]
    table.add_section()
    add("training, in all", sum(known))
    table.add_section()
    add("decoding state of a sequence", report["state_bytes_per_sequence"])
    rows = report["rows_per_step"]
    table.caption = f"{report['steps']:,} steps of {rows} row{'s' if rows > 1 else ''}"
    if others := report["rows_for_the_memory_per_step"]:
        table.caption += f" and {others} for the memory alone"
    if report["epochs"] is not None:
        table.caption += f", {report['epochs']:.3g} passes over the data"
    return table


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(x.nbytes for x in arrays)


def _count(arrays: Iterable[Any]) -> int:
    return sum(x.size for x in arrays)
