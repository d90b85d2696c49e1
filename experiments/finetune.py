"""``python -m experiments.finetune``: gives a pretrained model a memory and trains it."""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from convert.pretrained import ExportFormat
from experiments.command_line import run_configured
from experiments.process.compilation_cache import prepare_process
from experiments.process.distributed import joined
from experiments.process.interrupts import TerminationError, termination_raises
from experiments.process.output_folder import locked_output
from experiments.training import FinetuneConfig
from experiments.training.checks import check_output, describe_run, resumed_description
from experiments.training.dry_run import dry_run
from experiments.training.fitting import fit_memory
from experiments.training.full_layers import with_written_layers
from experiments.training.horizon import with_horizon
from experiments.training.outcome import Outcome
from experiments.training.prepare import prepare_run
from experiments.training.push import check_push, choose_pushed_format, push_run
from experiments.training.resume.settings import flat_settings
from experiments.training.run import Run
from experiments.training.run_report import write_run_report
from experiments.training.samples import show_sample
from experiments.training.stage import Stage
from experiments.training.summary import write_summary
from experiments.training.text_training import train_on_text
from experiments.training.trackers import Tracker, import_trackers, open_trackers
from tptt_jax import warm_up
from tptt_jax.model import replace_memory
from tptt_jax.processes import failing_together, is_first_process
from tptt_jax.sharding import on_mesh
from tptt_jax.training.partition import load_trainable

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def finetune(config: FinetuneConfig, trackers: Sequence[Tracker] = ()) -> dict[str, Any]:
    """Runs or resumes a fine-tuning run; returns what --json prints.

    SIGTERM ends it after the step at hand: the state is saved, and the exit status is 0.

    Args:
      config: of the run.
      trackers: your own, which get the metrics of every step and are closed at the end.
    """
    prepare_process()
    try:
        with joined(config.distributed), termination_raises():
            report = _finetune(config, trackers)
        if config.hub.push_to_hub is not None and not config.dry_run:
            report |= _push(config, report.pop("push_format"))
    except TerminationError as stop:
        report = _print_resume_command(config, stop) if is_first_process() else {}
    return report if is_first_process() else {}


def _push(config: FinetuneConfig, format: ExportFormat) -> dict[str, Any]:
    """Pushes the run from the first process; the others have ended."""
    if jax.process_count() > 1:
        # Otherwise they would report the uploading process as lost.
        jax.distributed.shutdown()
    if not is_first_process():
        return {}
    with termination_raises():
        pushed = push_run(config.hub, config.output, format)
    print(f"pushed to {pushed['url']}")
    return {"pushed": pushed}


def _print_resume_command(config: FinetuneConfig, stop: TerminationError) -> dict[str, Any]:
    """Prints the command that resumes a run stopped by SIGTERM; returns what --json prints."""
    output = config.output
    settings = output / "config.yaml"
    command = "The same command" if config.resume else "The same command without --no-resume"
    print(f"{stop}; nothing is lost. {command} resumes the run", end="")
    # config.yaml does not say which processes there are.
    if settings.is_file() and not config.distributed.is_on:
        print(f", or:\n  python -m experiments.finetune --config {shlex.quote(str(settings))}")
    else:
        print(".")
    return {"output": str(output), "terminated": str(stop)}


def _finetune(config: FinetuneConfig, trackers: Sequence[Tracker]) -> dict[str, Any]:
    console = Console(soft_wrap=True, highlight=False)
    with contextlib.ExitStack() as lock:
        with failing_together():
            modules = import_trackers(config.trackers) if is_first_process() else {}
            written = resumed_description(config)
            config = with_horizon(with_written_layers(config, written), written)
            check_output(config, describe_run(config), written)
            if is_first_process():
                check_push(config.hub, config.output)
            if is_first_process() and not config.dry_run:
                lock.enter_context(locked_output(config.output))
        run = prepare_run(config, console)
        warm_up(run.model)
        with failing_together():
            format = choose_pushed_format(config.hub, run.model, config.model)
        with on_mesh(run.mesh, config.rules):
            if config.dry_run:
                return dry_run(run)
            opened = open_trackers(
                {} if run.was_complete else modules,
                trackers if is_first_process() else (),
                config.output,
                flat_settings(run.config),
                is_continued=run.resumption.is_started,
            )
            with opened as run.trackers:
                report = _run(run)
        return report if format is None else report | {"push_format": format}


def _run(run: Run) -> dict[str, Any]:
    # Keeps adapters that the source may have.
    outcome, base = Outcome(run), replace_memory(run.model, None)
    outcome.measure("before", base, use_memory=False)
    show_sample(run, "before", base)
    if run.window is not None:
        outcome.measure("window", run.model, use_memory=False)
    report: dict[str, Any] = {"output": str(run.config.output), "steps": run.steps}
    if run.data.bad_rows:
        report["bad_rows"] = len(run.data.bad_rows)
    if run.fit_rows is not None and not Stage.is_started_in(run.config.output):
        report["fit_seconds"] = fit_memory(run)
        outcome.measure("fitted", run.model)
    state, report["train_seconds"], report["resumed_at"] = train_on_text(run)
    load_trainable(run.model, state.trainable, state.share)
    if run.steps:
        outcome.measure("after", run.model)
    if run.steps and run.has_memory:
        outcome.measure("memory_off", run.model, use_memory=False)
    show_sample(run, "after", run.model)
    outcome.plot()
    if is_first_process():
        write_run_report(run, outcome)
        write_summary(run, outcome, state)
    outcome.print(run.console)
    return report | outcome.report()


def run_finetune(
    function: Callable[[FinetuneConfig], dict[str, Any] | None],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """`run_configured` for fine-tuning; without --model, --data and --config it runs the demo."""
    given = list(sys.argv[1:] if argv is None else argv)
    chosen = {flag.partition("=")[0] for flag in given}
    if not chosen & {"--model", "--data", "--config", "--help", "-h"}:
        given = ["--config", str(DEMO_CONFIG), *given]
    return run_configured(function, FinetuneConfig, given, prog=prog)


def main() -> None:
    """The command."""
    sys.exit(run_finetune(finetune, prog="python -m experiments.finetune"))


if __name__ == "__main__":
    main()
