"""``python -m experiments.grid``: many runs of finetune that differ in some settings."""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from convert.command_line import run_command
from experiments.process.output_folder import locked_output
from experiments.sweep.plan import Variant, read_plan
from experiments.sweep.runner import Outcome, check_folders, run_variant
from experiments.sweep.table import gap_left, markdown_table, rich_table, table_rows
from tptt_jax.durable import atomic_file


def run_grid(config: Path, output: Path = Path("runs/grid")) -> dict[str, Any]:
    """Runs the variants of a YAML file in turn; finished ones are skipped.

    The file has blocks: `base`, settings as in a configuration of experiments.finetune; `variants`,
    changes to them by name, nested or dotted (``rank 64: {liza.memory_rank: 64}``); `grid`, lists
    of values by setting (``seed: [0, 1, 2]``), all combinations of which run with each variant.
    experiments/configs/grids/ablation.yaml is an example.

    Args:
      config: the YAML file.
      output: directory for results.json, table.md and a directory of each run, with the run's
        output. An interrupted run resumes from its last checkpoint.
    """
    variants = read_plan(config)
    with locked_output(output):
        return _run_variants(output, variants)


def _run_variants(output: Path, variants: list[Variant]) -> dict[str, Any]:
    check_folders(output, variants)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{len(variants)} variants; each prints to {output}/NAME/stdout.txt", markup=False
    )
    outcomes = []
    for variant in variants:
        outcome = run_variant(output, variant)
        if outcome.report is not None:
            report = outcome.report | {"gap_left": gap_left(output / variant.folder)}
            outcome = dataclasses.replace(outcome, report=report)
        console.print(_line(outcome), markup=False)
        outcomes.append(outcome)
    rows = table_rows(outcomes)
    console.print(rich_table(rows))
    result = {
        "output": str(output),
        "variants": {
            outcome.name: {
                "settings": variant.settings,
                "report": outcome.report,
                "seconds": outcome.seconds,
                "error": outcome.error or None,
            }
            for variant, outcome in zip(variants, outcomes, strict=True)
        },
        "passed": all(outcome.report is not None for outcome in outcomes),
    }
    for name, text in (
        ("results.json", json.dumps(result, indent=2, default=str) + "\n"),
        ("table.md", markdown_table(rows)),
    ):
        with atomic_file(output / name) as path:
            path.write_text(text, encoding="utf-8")
    console.print(f"results and table are in {output}", markup=False)
    return result


def _line(outcome: Outcome) -> str:
    if outcome.report is None:
        return f"{outcome.name}: failed after {outcome.seconds:.0f} s: {outcome.error}"
    names = ("perplexity_fitted", "perplexity_after", "perplexity_window", "perplexity_before")
    found = [(name, outcome.report[name]) for name in names if name in outcome.report]
    measured = "".join(f", {name.replace('_', ' ')} {value:.2f}" for name, value in found[:1])
    done = f"done in {outcome.seconds:.0f} s" if outcome.is_new else "already finished"
    return f"{outcome.name}: {done}{measured}"


def main() -> None:
    """The command."""
    sys.exit(run_command(run_grid, prog="python -m experiments.grid", readable=False))


if __name__ == "__main__":
    main()
