"""``python -m experiments.bench``: operators, training steps, decoding, contexts, scaling."""

import sys

from convert.command_line import run_command
from experiments.benchmarks.attention import bench_attention
from experiments.benchmarks.long_context import bench_context
from experiments.benchmarks.model_work import bench_decode, bench_train
from experiments.benchmarks.operator import bench_op
from experiments.benchmarks.scaling import bench_scaling

COMMANDS = {
    "op": bench_op,
    "train": bench_train,
    "decode": bench_decode,
    "attention": bench_attention,
    "context": bench_context,
    "scaling": bench_scaling,
}


def main() -> None:
    """The command."""
    sys.exit(run_command(COMMANDS, prog="python -m experiments.bench"))


if __name__ == "__main__":
    main()
