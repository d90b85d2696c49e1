"""``python -m experiments.bench``: speed of the parts, cost and survival of runs."""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import sys

from convert.command_line import run_command
from experiments.benchmarks.attention import bench_attention
from experiments.benchmarks.kills import bench_kills
from experiments.benchmarks.long_context import bench_context
from experiments.benchmarks.model_work import bench_decode, bench_train
from experiments.benchmarks.operator import bench_op
from experiments.benchmarks.saves import bench_saves
from experiments.benchmarks.scaling import bench_scaling
from experiments.benchmarks.step_memory import bench_memory

COMMANDS = {
    "op": bench_op,
    "train": bench_train,
    "decode": bench_decode,
    "attention": bench_attention,
    "context": bench_context,
    "memory": bench_memory,
    "scaling": bench_scaling,
    "saves": bench_saves,
    "kills": bench_kills,
}


def main() -> None:
    """The command."""
    sys.exit(run_command(COMMANDS, prog="python -m experiments.bench"))


if __name__ == "__main__":
    main()
