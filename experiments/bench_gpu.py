"""``python -m experiments.bench_gpu``: all benchmarks that matter on a GPU, in ten minutes.

The operator beside flash-linear-attention's, cuDNN's softmax attention beside ours, a LoRA step,
decoding and long contexts of a model of Llama 3.2 1B's shape. Every part runs in a process of its
own, so peak memory is measured for each and a failure ends one part only; gpu.json is written after
every part.
"""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.command_line import run_command
from experiments.benchmarks.timing import write_result

_PEER = Path("tests/parity/fla_operator.py")
# Seconds for one part: the peer's compiler tries many settings, for minutes.
_LONGEST_PART = 240
# Without it XLA takes three quarters of the GPU at most.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
# Tiny programs take long to compile and no time to run.
_SMOKE_ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


class Sizes(NamedTuple):
    """Arguments of `experiments.bench` that all parts of one kind share."""

    op: str = "--batch 4 --tokens 8192 --heads 16 --head-dim 128 --dtype bfloat16 --repeats 10"
    attention: str = "--batch 8 --tokens 2048 --heads 32 --kv-heads 8 --head-dim 64"
    model: str = "--random-weights llama3.2-1b --dtype bfloat16"
    train: str = "--batch 8 --tokens 2048"
    decode: str = "--tokens 128"
    context: str = "--contexts 1024 4096 16384 65536 --full-read-limit 65536"


_SMOKE = Sizes(
    op="--batch 2 --tokens 96 --heads 2 --head-dim 16 --dtype bfloat16 --repeats 1",
    attention="--batch 2 --tokens 48 --heads 2 --kv-heads 1 --head-dim 8 --repeats 1",
    model="--random-weights tiny --dtype bfloat16",
    train="--batch 2 --tokens 32 --repeats 1",
    decode="--tokens 4 --repeats 1",
    context="--contexts 128 192 --window 16 --new-tokens 64",
)


def bench_gpu(
    output: Path = Path("runs/gpu"),
    only: tuple[str, ...] = (),
    minutes: float = 10.0,
    smoke: bool = False,
    peer_python: Path = Path(sys.executable),
) -> dict[str, Any]:
    """Runs every part and writes each result as soon as it is measured.

    Args:
      output: directory for gpu.json; its folder "context" gets context.json and context.png.
      only: names of parts; none: all.
      minutes: time limit for all parts together; no part may take more than 4.
      smoke: tiny sizes, to check on any machine that everything runs.
      peer_python: interpreter that has torch with CUDA and flash-linear-attention.
    """
    sizes = _SMOKE if smoke else Sizes()
    environment = (_SMOKE_ENVIRONMENT if smoke else _ENVIRONMENT) | os.environ
    parts = commands(sizes, output / "context", peer_python)
    if unknown := [name for name in only if name not in parts]:
        raise ValueError(f"there is no part {', '.join(unknown)}; there are {', '.join(parts)}.")
    start, done = time.monotonic(), {}
    end = start + 60 * minutes
    report: dict[str, Any] = {"bench": "gpu", "smoke": smoke, "parts": done}
    for name in only or parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result = _run_part(parts[name], end - time.monotonic(), environment)
        if name.startswith("train") and "failed" in result:
            # Most likely out of memory; recomputing layers takes a fraction of it.
            again = _run_part(
                [*parts[name], "--remat", "full"], end - time.monotonic(), environment
            )
            result = again | {"without_remat": result}
        done[name] = result
        report |= {"seconds": time.monotonic() - start, "against_fla": _against_peer(done)}
        report["passed"] = not any("failed" in each for each in done.values())
        write_result(output / "gpu.json", report)
        print(f"{name}: {_describe(result)}", file=sys.stderr, flush=True)
    return report


def commands(sizes: Sizes, context: Path, peer_python: Path) -> dict[str, list[str]]:
    """The command line of every part, by name; each prints one JSON object last."""
    parts = _operators(sizes, "default")
    peer = [str(peer_python), "-m", ".".join(_PEER.with_suffix("").parts)]
    parts["fla"] = [*peer, *sizes.op.split()]
    for name, flags in (
        ("", []),
        ("-packed", ["--documents", "4"]),
        ("-window", ["--window", "512"]),
    ):
        parts[f"attention{name}"] = _bench(["attention", *sizes.attention.split(), *flags])
    model = sizes.model.split()
    for name, flag in (("titan", []), ("base", ["--no-liza"])):
        parts[f"train-{name}"] = _bench(["train", *model, *sizes.train.split(), *flag])
    for name, flag in (("titan", []), ("base", ["--no-liza"])):
        parts[f"decode-{name}"] = _bench(["decode", *model, *sizes.decode.split(), *flag])
    arguments = ["context", *model, *sizes.context.split(), "--output", str(context)]
    parts["context"] = _bench(arguments)
    # The peer multiplies in bfloat16; the last part shows the cost of float32 products.
    return parts | _operators(sizes, "highest", "-exact")


def _operators(sizes: Sizes, precision: str, mark: str = "") -> dict[str, list[str]]:
    parts = {}
    for steps in (1, 2):
        # Also gradients without a gate: with one, the peer refuses some compilers.
        for suffix, flags in (
            ("", ["--decay"]),
            ("-grad", ["--decay", "--grad"]),
            ("-ungated-grad", ["--grad"]),
        ):
            arguments = ["op", *sizes.op.split(), "--householder", str(steps), *flags]
            parts[f"op-n{steps}{suffix}{mark}"] = _bench([*arguments, "--precision", precision])
    return parts


def _bench(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "experiments.bench", *arguments, "--json"]


def _run_part(command: list[str], seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """The result of a part, or {"skipped": reason} or {"failed": reason}."""
    seconds = min(seconds, _LONGEST_PART)
    if seconds <= 0:
        return {"skipped": "no time was left; --only runs single parts, --minutes gives more"}
    if _PEER.stem in command[2] and not _PEER.exists():
        return {"skipped": f"{_PEER} is not in the working directory"}
    try:
        ended = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        why = f"did not finish in {seconds:.0f} s"
        # A part that reports as it runs keeps its measurements so far, in complete lines.
        *lines, _ = (stopped.stdout or b"").decode().split("\n")
        try:
            return json.loads(lines[-1]) | {"stopped": why}
        except (IndexError, ValueError):
            return {"failed": why}
    lines = ended.stdout.strip().splitlines()
    if ended.returncode == 0 and lines:
        # For example that kernels fail on this GPU, and what replaces them.
        said = [line for line in ended.stderr.splitlines() if "UserWarning: " in line]
        return json.loads(lines[-1]) | ({"warnings": said} if said else {})
    last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": f"exit status {ended.returncode}: {last:.500}"}


def _against_peer(done: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The peer's seconds per second of ours, for each operator that both have run."""
    theirs = done.get("fla", {}).get("median_s", {})
    return {name: theirs[name] / done[name]["median_s"] for name in theirs if name in _timed(done)}


def _timed(done: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, result in done.items() if isinstance(result.get("median_s"), float)}


def _describe(result: dict[str, Any]) -> str:
    for key in ("failed", "skipped", "stopped"):
        if key in result:
            return f"{key}: {result[key]}"
    if "tokens_per_s" in result:
        share = 100 * result["utilisation"]
        return f"{result['tokens_per_s']:.0f} tokens/s, {share:.1f}% of the arithmetic ceiling"
    return "measured"


def main() -> None:
    """The command."""
    sys.exit(run_command(bench_gpu, prog="python -m experiments.bench_gpu", readable=False))


if __name__ == "__main__":
    main()
