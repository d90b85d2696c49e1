"""``python -m experiments.bench kills``: a run that is killed at random, and an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.benchmarks.timing import Options, check_positive, machine, write_result
from experiments.training.metrics import StepRecord, read_metrics
from experiments.training.stage import STAGES
from tptt_jax.training.checkpoint import latest_step
from tptt_jax.training.orbax_files import PARTS, read_shapes, read_trees

_DIFFERENCES = ("lost_steps", "different_losses", "different_arrays")
# Upper bound; otherwise a run that fails at startup restarts forever.
_MOST_FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class KillWork:
    """A small run of finetune, and the moments of its deaths."""

    model: str = "smollm2-135m"
    """A model as finetune takes it."""
    steps: int = 2000
    """Training steps, after the fit of the memory."""
    tokens: int = 64
    """Per row; a step has one row."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    minutes: float = 30.0
    """How long the run is killed; afterwards it may finish."""
    between: tuple[float, float] = (60.0, 180.0)
    """Seconds from a start to the kill, drawn between these."""
    seed: int = 1
    """Draws the moments."""

    def __post_init__(self) -> None:
        """Rejects times that are not in order."""
        check_positive(self)
        low, high = self.between
        if not 0 < low <= high or not self.minutes > 0:
            raise ValueError(
                f"expected minutes above 0 and between = LOW HIGH with 0 < LOW <= HIGH, got "
                f"minutes = {self.minutes} and between = {low} {high}."
            )

    def command(self, output: Path) -> list[str]:
        """The command of the run."""
        options = {
            **{"--model": self.model, "--output": output, "--steps": self.steps},
            **{"--data.sequence-length": self.tokens, "--batch-size": 1, "--sample-tokens": 0},
            **{"--checkpoint-every": self.checkpoint_every, "--data.eval-tokens": 512},
            **{"--fit-steps": 4, "--distill-steps": 4, "--fit-length": self.tokens},
            **{"--fit-batch-size": 1, "--liza.softmax-window": self.tokens // 4},
        }
        words = [str(word) for option in options.items() for word in option]
        return [sys.executable, "-m", "experiments.finetune", *words]


def bench_kills(
    work: Options[KillWork],
    output: Path = Path("runs/kills"),
    *,
    undisturbed: tyro.conf.FlagCreatePairsOff[bool] = True,
) -> dict[str, Any]:
    """Kills a run again and again until it is complete, and compares it with an undisturbed one.

    Both call `python -m experiments.finetune`; kill is signal 9. Writes kills.json.

    Args:
      work: the run, and when it is killed.
      output: directory of both runs and of the report.
      undisturbed: train the other run now; otherwise it must be complete in OUTPUT/undisturbed.
    """
    whole, killed = output / "undisturbed", output / "killed"
    if undisturbed:
        _finish(work.command(whole), output / "undisturbed.log")
    elif latest_step(whole) != work.steps:
        raise ValueError(
            f"{whole} has no run of {work.steps} steps to compare with: leave --no-undisturbed out."
        )
    report: dict[str, Any] = {
        "bench": "kills",
        **machine(),
        "command": " ".join(work.command(killed)[1:]),
        **_kill_until_complete(work, killed, output / "killed.log"),
        **compare_runs(whole, killed),
    }
    report["passed"] = not any(report[name] for name in _DIFFERENCES)
    write_result(output / "kills.json", report)
    return report


def compare_runs(whole: Path, killed: Path) -> dict[str, Any]:
    """What a run's directory lacks or has differently from another's.

    Returns:
      `lost_steps`: steps that are missing in metrics.jsonl, or there more than once;
      `different_losses`: steps whose loss or gradient norm is not equal bit for bit;
      `different_arrays`: arrays of the last checkpoints that are not equal bit for bit, and
      `arrays`, how many were compared.
    """
    stages = [stage for stage in STAGES if latest_step(whole / stage) is not None]
    lost = different = 0
    for stage in stages:
        mine, theirs = (read_metrics(run / stage / "metrics.jsonl") for run in (killed, whole))
        lost += abs(len(mine) - len(theirs))
        lost += sum(a.step != b.step for a, b in zip(mine, theirs, strict=False))
        different += sum(_numbers(a) != _numbers(b) for a, b in zip(mine, theirs, strict=False))
    arrays = [dict(_arrays(run, stages)) for run in (killed, whole)]
    names = arrays[0].keys() | arrays[1].keys()
    unequal = [
        name
        for name in names
        if any(name not in each for each in arrays)
        or arrays[0][name].tobytes() != arrays[1][name].tobytes()
    ]
    return {
        "lost_steps": lost,
        "different_losses": different,
        "different_arrays": len(unequal),
        "arrays": len(names),
    }


def _numbers(record: StepRecord) -> tuple[str, ...]:
    return tuple(map(str, (record.loss, record.grad_norm, record.mu_mean)))


def _arrays(run: Path, stages: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of a run's last checkpoints, optimizer included, by stage and name."""
    for stage in stages:
        folder = run / stage / "checkpoints" / str(latest_step(run / stage))
        targets = {
            part: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), read_shapes(folder, part)
            )
            for part in PARTS
        }
        for path, value in jax.tree.leaves_with_path(dict(read_trees(folder, targets))):
            yield stage + jax.tree_util.keystr(path), np.asarray(value)


def _kill_until_complete(work: KillWork, run: Path, log: Path) -> dict[str, Any]:
    """Starts a run and kills it until it ends by itself after `work.minutes`."""
    draw, begin = np.random.default_rng(work.seed), time.monotonic()
    kills = saving = repeated = failures = 0
    while True:
        spent = time.monotonic() - begin
        pause = None if spent > 60 * work.minutes else draw.uniform(*work.between)
        status = _run_for(work.command(run), log, pause)
        if status == 0:
            break
        if status != -signal.SIGKILL:
            failures += 1
            if failures == _MOST_FAILURES:
                raise ValueError(f"the run ended with status {status}: {log} says why.")
            continue
        kills += 1
        saving += any(any((run / stage).glob("checkpoints/.*")) for stage in STAGES)
        repeated += _steps_to_repeat(run)
    return {
        "minutes": (time.monotonic() - begin) / 60,
        "kills": kills,
        "kills_while_saving": saving,
        "repeated_steps": repeated,
        "failed_starts": failures,
    }


def _steps_to_repeat(run: Path) -> int:
    """Steps that are in metrics.jsonl, but in no checkpoint."""
    count = 0
    for stage in STAGES:
        file = run / stage / "metrics.jsonl"
        if file.exists():
            last = max((record.step for record in read_metrics(file)), default=0)
            count += max(0, last - (latest_step(run / stage) or 0))
    return count


def _run_for(command: list[str], log: Path, seconds: float | None) -> int:
    """The status of a command that is killed after `seconds`; None: it may finish."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except BaseException as reason:
            # With the processes that it has started; also after Ctrl-C.
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            return status


def _finish(command: list[str], log: Path) -> None:
    """Runs a command to its end."""
    status = _run_for(command, log, None)
    if status:
        raise ValueError(f"the undisturbed run ended with status {status}: {log} says why.")
