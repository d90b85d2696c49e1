"""Timing of one workload: the median, its arithmetic floor, a trace, a baseline."""

import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks.baseline import compare, read_baseline
from experiments.process.compilation_cache import prepare_process
from experiments.process.memory_use import host_peak_gb, peak_gb
from tptt_jax.durable import atomic_file
from tptt_jax.ops.devices import platform_of

Work = TypeVar("Work")
# A parameter whose fields are options of the command itself, without a prefix.
Options = Annotated[Work, tyro.conf.arg(name="")]

# A product of this size is as fast as any, and short: 20 ms on two CPU cores, 2 ms on a GPU.
_CEILING_SIZE = {"cpu": 1024}
_ACCELERATOR_CEILING_SIZE = 8192
_CEILING_RUNS = 7


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How often to measure, and what to do with the result."""

    repeats: int = 5
    """Timed runs after the first, which compiles; the result is their median."""
    profile: Path | None = None
    """Directory for a trace of one more run. "trace" in the result names the file, which
    ui.perfetto.dev opens in a browser."""
    output: Path | None = None
    """JSON file for the result."""
    compare: Path | None = None
    """The --output file of an earlier run of the same workload; "compare" in the result has the
    ratios of time and memory."""

    def __post_init__(self) -> None:
        """Rejects fewer than one run."""
        check_positive(self)


class Job(NamedTuple):
    """A workload to be timed.

    Attributes:
      run: runs once and waits for the result.
      tokens: tokens per run.
      flops: operations per run, see `experiments.benchmarks.flops`.
      about: further entries of the result.
      control: the same workload without the memory, timed alternately with `run`; None: no control.
    """

    run: Callable[[], object]
    tokens: int
    flops: float
    about: Mapping[str, Any] = MappingProxyType({})
    control: Callable[[], object] | None = None


def measure(bench: str, work: Any, prepare: Callable[[Any], Job], timing: Timing) -> dict[str, Any]:
    """Times one workload.

    Args:
      bench: the subcommand.
      work: a dataclass that defines the workload, with a field `dtype`.
      prepare: builds its job.
      timing: the options.

    Returns:
      `median_s` and `tokens_per_s` of the timed runs; `first_run_s`, which compiles; `peak_gb`, of
      the accelerator or on a CPU of the process (`host_peak_gb` in any case);
      `matmul_ceiling_flops`, FLOP/s of a large square matrix product in the same dtype, measured
      right after the workload; `model_flops`, the operations of the workload; `floor_s`, their time
      at the ceiling; `utilisation`, floor_s / median_s; and the entries of the job.
      With a control also `window_alone_s`, its median, and `memory_cost`, the median over pairs of
      runs of the time with the memory over the time without.

    Raises:
      ValueError: if the baseline is of another workload.
    """
    workload = dataclasses.asdict(work)
    baseline = None if timing.compare is None else read_baseline(timing.compare, bench, workload)
    prepare_process()
    job = prepare(work)
    first, control = _seconds(job.run), []
    if job.control is not None:
        _seconds(job.control)
    seconds = []
    for _ in range(timing.repeats):
        seconds.append(_seconds(job.run))
        if job.control is not None:
            control.append(_seconds(job.control))
    median = statistics.median(seconds)
    result = {
        "bench": bench,
        **machine(),
        "workload": workload,
        **job.about,
        "median_s": median,
        "tokens_per_s": job.tokens / median,
        "first_run_s": first,
        "peak_gb": peak_gb(),
        "host_peak_gb": host_peak_gb(),
    }
    if control:
        # Pairs: a temporary slowdown of the machine affects both runs of a pair.
        ratios = [mine / theirs for mine, theirs in zip(seconds, control, strict=True)]
        result |= {
            "window_alone_s": statistics.median(control),
            "memory_cost": statistics.median(ratios),
        }
    ceiling = matmul_ceiling(jnp.dtype(work.dtype))
    result |= {
        "model_flops": job.flops,
        "matmul_ceiling_flops": ceiling,
        "floor_s": job.flops / ceiling,
        "utilisation": job.flops / (median * ceiling),
    }
    if timing.profile is not None:
        result["trace"] = str(_trace(job.run, timing.profile))
    if baseline is not None and timing.compare is not None:
        result["compare"] = compare(result, baseline, timing.compare)
    if timing.output is not None:
        write_result(timing.output, result)
    return result


def machine() -> dict[str, str]:
    """The machine, its software and the time, for reports."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def matmul_ceiling(dtype: jnp.dtype) -> float:
    """FLOP/s of a large square matrix product at the default precision; median of a few runs."""
    size = _CEILING_SIZE.get(platform_of(), _ACCELERATOR_CEILING_SIZE)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = [_seconds(lambda: product(a, b).block_until_ready()) for _ in range(_CEILING_RUNS)]
    return 2 * size**3 / statistics.median(seconds[1:])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON, atomically."""
    with atomic_file(path) as temporary:
        text = json.dumps(result, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def check_positive(options: Any) -> None:
    """Raises ValueError if an integer field of a dataclass is below 1."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{field.name} must be at least 1, got {value}.")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _trace(run: Callable[[], object], directory: Path) -> Path:
    """Traces one run and returns the file that ui.perfetto.dev opens."""
    with jax.profiler.trace(directory, create_perfetto_trace=True):
        run()
    written = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    return max(written, key=lambda path: path.stat().st_mtime)
