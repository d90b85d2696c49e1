"""The benchmark commands: results, traces, baselines, interrupts."""

import gzip
import inspect
import json
import os
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from convert.command_line import run_command
from experiments import bench_gpu
from experiments.bench import COMMANDS
from experiments.benchmarks import long_context as bench_context
from experiments.benchmarks.baseline import compare
from experiments.benchmarks.model_work import DecodeWork
from experiments.benchmarks.model_work import _decoding as prepare_decoding
from experiments.benchmarks.random_models import SHAPES, ModelChoice
from experiments.benchmarks.timing import Job, Timing, measure
from tests.parity import fla_operator
from tptt_jax import LizaConfig, LoraConfig
from tptt_jax.ops.delta_product import choice as delta_product_choice
from tptt_jax.ops.delta_product import trial as kernel_trial

OP = "op --tokens 40 --heads 2 --head-dim 8 --chunk-size 16 --repeats 1"
TINY = "--random-weights tiny --no-liza --repeats 1"


def run(arguments: str, capsys) -> dict:
    assert run_command(COMMANDS, [*arguments.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(arguments: str, capsys) -> str:
    assert run_command(COMMANDS, arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A file that an earlier run has written, and the directory of its trace."""
    directory = tmp_path_factory.mktemp("bench")
    arguments = f"{OP} --output {directory}/op.json --profile {directory}/profile"
    assert run_command(COMMANDS, arguments.split()) == 0
    return directory / "op.json"


def check_meaning(result: dict, tokens: int) -> None:
    assert {"device", "jax", "date", "peak_gb", "first_run_s"} <= result.keys()
    assert result["tokens_per_s"] == pytest.approx(tokens / result["median_s"])
    floor = result["model_flops"] / result["matmul_ceiling_flops"]
    assert result["floor_s"] == pytest.approx(floor)
    assert result["utilisation"] == pytest.approx(floor / result["median_s"])
    assert result["peak_gb"] > 0


COMMAND_LINES = {
    "op": (f"{OP} --batch 2", 80),
    "op, all options": (f"{OP} --kv-heads 1 --decay --grad --dtype bfloat16", 40),
    "train, memory": (
        *("train --tokens 12 --train memory --window 4 --random-weights tiny --repeats 1", 24),
    ),
    "train, full": (
        f"train --batch 3 --tokens 12 --train full --dtype bfloat16 --remat dots {TINY}",
        36,
    ),
    "decode": (f"decode --batch 2 --tokens 3 {TINY}", 6),
}


def test_memory_is_counted_without_a_run(capsys):
    result = run("memory --random-weights tiny --tokens 8 --base-dtype int8", capsys)
    parts = [result[f"{name}_bytes"] for name in ("base", "state", "step")]
    assert min(parts) > 0
    assert result["total_bytes"] == sum(parts)
    # Of 12 bytes each, adapters of rank 8.
    assert result["state_bytes"] > 12 * 8 * 2 * 32
    assert result["workload"]["base_dtype"] == "int8"


@pytest.mark.parametrize(("arguments", "tokens"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_results(arguments, tokens, capsys):
    result = run(arguments, capsys)
    check_meaning(result, tokens)
    name, *rest = arguments.split()
    assert result["bench"] == name
    assert result.get("implementation") == ("xla" if name == "op" else None)
    # The workload says what was done, and nothing of how it was measured.
    assert "repeats" not in result["workload"]
    assert result["workload"]["tokens"] == int(rest[rest.index("--tokens") + 1])


@pytest.mark.parametrize("agree", [True, False])
def test_the_result_says_which_program_ran(agree, capsys, monkeypatch):
    """As if a GPU were there whose kernels are right, or wrong."""
    monkeypatch.setattr(delta_product_choice, "compute_capability", lambda *_: (9, 0))
    monkeypatch.setattr(kernel_trial, "earlier_verdict", lambda kind: agree)
    result = run("op --tokens 3 --heads 1 --head-dim 16 --dtype bfloat16 --repeats 1", capsys)
    assert result["implementation"] == ("pallas" if agree else "xla")


@pytest.mark.parametrize("options", ["", "--window 5", "--documents 3", "--documents 2 --window 4"])
def test_fused_attention_beside_the_bounded_one(options, capsys):
    sizes = "--batch 2 --tokens 24 --heads 2 --kv-heads 1 --head-dim 8 --repeats 1"
    result = run(f"attention {sizes} --dtype float32 {options}", capsys)
    assert result["fused"] == "xla"
    assert result["difference"].keys() == {
        *("output", "gradient of q", "gradient of k", "gradient of v")
    }
    assert max(result["difference"].values()) < 1e-5
    assert result["median_s"].keys() == {"fused", "bounded"}
    half = run(f"attention {sizes} {options}", capsys)
    assert max(half["difference"].values()) < 3e-2


@pytest.mark.parametrize("work", ["train --tokens 12", "decode --tokens 3"])
def test_a_memory_is_timed_beside_its_window_alone(work, capsys):
    result = run(f"{work} --random-weights tiny --window 4 --repeats 1", capsys)
    assert result["window_alone_s"] > 0
    assert result["memory_cost"] == pytest.approx(result["median_s"] / result["window_alone_s"])


def test_the_cost_of_a_memory_is_the_median_of_pairs(monkeypatch):
    """A slow spell that catches one of two runs does not count, nor does the first one."""
    seconds = iter([9.0, 9.0, 3.0, 2.0, 30.0, 10.0, 4.0, 2.0])
    monkeypatch.setattr(
        "experiments.benchmarks.timing._seconds", lambda run: (run(), next(seconds))[1]
    )
    monkeypatch.setattr("experiments.benchmarks.timing.matmul_ceiling", lambda dtype: 1.0)
    ran = []
    job = Job(lambda: ran.append("memory"), 8, 1.0, control=lambda: ran.append("window"))
    result = measure("decode", DecodeWork(random_weights="tiny"), lambda _: job, Timing(repeats=3))
    assert ran == ["memory", "window"] * 4
    assert (result["median_s"], result["window_alone_s"], result["memory_cost"]) == (4.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "options", [{"no_liza": True}, {"writes": "all"}, {"window": None}], ids=str
)
def test_without_a_memory_of_evicted_tokens_there_is_no_control(options):
    work = DecodeWork(random_weights="tiny", **options)
    assert prepare_decoding(work).control is None
    assert prepare_decoding(DecodeWork(random_weights="tiny")).control is not None


def test_arithmetic_is_that_of_the_work(capsys):
    forward, gradients, longer = (
        run(arguments, capsys)["model_flops"]
        for arguments in (OP, f"{OP} --grad", OP.replace("--tokens 40", "--tokens 120"))
    )
    assert gradients == longer == 3 * forward


def test_trace_is_what_perfetto_opens(baseline):
    trace = json.loads(baseline.read_text())["trace"]
    assert trace.startswith(str(baseline.parent / "profile"))
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("ph") == "X" and event.get("dur", 0) > 0 for event in events)


def test_output_is_the_result_and_all_of_it(baseline, tmp_path, capsys, monkeypatch):
    output = tmp_path / "made" / "op.json"
    result = run(f"{OP} --output {output}", capsys)
    assert json.loads(output.read_text()) == result
    before = output.read_text()
    monkeypatch.setattr("json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_command(COMMANDS, [*OP.split(), "--output", str(output)])
    assert output.read_text() == before
    assert list(output.parent.iterdir()) == [output]


def test_comparison_with_a_baseline(baseline, tmp_path, capsys):
    other = json.loads(baseline.read_text()) | {"device": "abacus"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    result = run(f"{OP} --compare {tmp_path}/other.json", capsys)
    found = result["compare"]
    assert found["device_differs"]
    assert found["baseline_device"] == "abacus"
    assert found["speedup"] == pytest.approx(other["median_s"] / result["median_s"])
    assert found["memory_saving"] == pytest.approx(other["peak_gb"] / result["peak_gb"])
    assert found["first_run_speedup"] == pytest.approx(other["first_run_s"] / result["first_run_s"])


def test_ratios_above_one_are_better():
    then = {"median_s": 3.0, "first_run_s": 8.0, "peak_gb": 1.0, "device": "cpu"}
    now = {"median_s": 1.0, "first_run_s": 4.0, "peak_gb": 2.0, "device": "cpu"}
    found = compare(now, then, None)
    assert (found["speedup"], found["first_run_speedup"], found["memory_saving"]) == (3, 2, 0.5)
    assert not found["device_differs"]
    # Earlier results do not say it.
    assert not compare(now | {"implementation": "xla"}, then, None)["implementation_differs"]
    kernels = then | {"implementation": "pallas"}
    assert compare(now | {"implementation": "xla"}, kernels, None)["implementation_differs"]


BAD_BASELINES = {
    "other size": (
        {"workload": {"tokens": 99}},
        "workload: tokens: 99 in the file, 40 now",
    ),
    "other bench": ({"bench": "train"}, "measured by bench train, not by bench op"),
    "no median": ({"median_s": None}, "must hold the result of an earlier run"),
    "zero": ({"peak_gb": 0}, "must hold the result of an earlier run"),
    "no workload": ({"workload": None}, "must hold the result of an earlier run"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_BASELINES.values(), ids=BAD_BASELINES)
def test_wrong_baselines(changes, message, baseline, tmp_path, capsys):
    found = json.loads(baseline.read_text())
    if changes.get("workload"):
        changes = {"workload": found["workload"] | changes["workload"]}
    (tmp_path / "bad.json").write_text(json.dumps(found | changes))
    assert message in refusal(f"{OP} --compare {tmp_path}/bad.json", capsys)


@pytest.mark.parametrize(
    "content", ["", "[1]", "3", "{}", '{"a": ', "[" * 100_000, "\xff"], ids=range(7)
)
def test_files_that_are_no_baselines(content, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="latin-1")
    line = refusal(f"{OP} --compare {path}", capsys)
    assert line.startswith(f"error: {path} must hold the result of an earlier run")


REFUSED = {
    "no baseline": (f"{OP} --compare /nowhere/op.json", "/nowhere/op.json"),
    "no runs": ("op --repeats 0", "repeats must be at least 1, got 0"),
    "no tokens": ("train --tokens 0", "tokens must be at least 1, got 0"),
    "two models": (f"decode --model demo {TINY}", "not both"),
    "no such shape": ("decode --random-weights huge", "--random-weights expects one of"),
    "heads": ("op --heads 3 --kv-heads 2 --tokens 8", "multiple"),
    "context, no tokenizer": (f"context --data {__file__} --random-weights tiny", "tokenizer"),
    "context, peer": (f"context --peer-json {__file__}", "must hold"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input(arguments, message, capsys):
    assert message in refusal(arguments, capsys)


def test_random_weights_are_made_in_their_dtype():
    choice = ModelChoice(random_weights="tiny", dtype="bfloat16")
    model = choice.load(LizaConfig(softmax_window=5), LoraConfig())
    assert model.config == SHAPES["tiny"]()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        is_ours = path[-1] in ("a", "b") or {"mag", "memory"} & set(path)
        assert variable.get_value().dtype == (jnp.float32 if is_ours else jnp.bfloat16), path


MEASURED = {
    **{"context": 128, "prefill_s_per_token": 0.1, "decode_s_per_token": 0.1, "state_bytes": 1},
    **{"resident_gb": 1.0, "peak_gb": 1.0},
}


def test_an_interrupt_leaves_what_was_measured(tmp_path, capsys, monkeypatch):
    def measure_one(*_, **__):
        yield MEASURED
        # What is on disk while the second context is being measured.
        assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_context, "measure_contexts", measure_one)
    peer = tmp_path / "peer.json"
    peer.write_text('{"runs": {"peer": [{"context": 128, "decode_s_per_token": 0.1}]}}')
    arguments = "context --random-weights tiny --contexts 128 256 --window 16"
    arguments += f" --peer-json {peer} --output {tmp_path}"
    assert run_command(COMMANDS, arguments.split()) == 130
    report = json.loads((tmp_path / "context.json").read_text())
    assert report["runs"]["Titan, window 16"] == [MEASURED]
    assert list(report["runs"]) == ["Titan, window 16", "peer"]
    assert report["workload"]["contexts"] == [128, 256]
    assert "Titan, window 16: 128 tokens, decoding 100.00 ms" in capsys.readouterr().err


def test_every_part_for_a_gpu_is_a_command(tmp_path, monkeypatch):
    """At full size, which nothing here can run: the arguments are at least understood."""
    done = []

    def record(function):
        def recorded(*args, **kwargs):
            done.append(inspect.signature(function).bind(*args, **kwargs).arguments)

        recorded.__wrapped__ = function
        recorded.__doc__ = function.__doc__
        return recorded

    recording = {name: record(function) for name, function in COMMANDS.items()}
    parts = bench_gpu.commands(bench_gpu.Sizes(), tmp_path, sys.executable)
    ours = {name: command[3:] for name, command in parts.items() if name != "fla"}
    assert all(run_command(recording, command) == 0 for command in ours.values())
    works = dict(zip(ours, (each["work"] for each in done), strict=True))
    operator = works["op-n2-grad"]
    assert (operator.batch, operator.tokens, operator.heads, operator.head_dim) == (
        4,
        8192,
        16,
        128,
    )
    assert operator.grad
    assert {work.dtype for work in works.values()} == {"bfloat16"}
    assert [works[f"train-{name}"].no_liza for name in ("titan", "base")] == [False, True]


def test_parts_for_a_gpu_run_at_tiny_sizes(tmp_path, capsys, monkeypatch):
    """One of each kind; `test_results` and the tests above run the other settings."""

    def run_here(command, seconds, environment):
        if command[2] == "experiments.bench":
            return run(" ".join(command[3:-1]), capsys)
        return {"median_s": {"op-n1": 1.0, "op-n2": 2.0}}

    monkeypatch.setattr(bench_gpu, "_run_part", run_here)
    only = ("op-n2", "op-n1-grad", "fla", "attention-packed", "train-base", "context")
    report = bench_gpu.bench_gpu(tmp_path, only=only, smoke=True)
    assert tuple(report["parts"]) == only
    assert report == json.loads((tmp_path / "gpu.json").read_text())
    assert report["passed"]
    assert report["parts"]["context"]["runs"].keys() == {"Titan, window 16", "full softmax"}
    ours = report["parts"]["op-n2"]["median_s"]
    assert report["against_fla"]["op-n2"] == pytest.approx(2 / ours)
    for name in ("op-n1-grad", "train-base"):
        assert report["parts"][name]["model_flops"] > 0


def test_parts_are_processes_and_may_fail(tmp_path, monkeypatch):
    def broken(sizes, context, peer):
        program = [sys.executable, "-c"]
        train = (
            "import sys; sys.argv[-2:] == ['--remat', 'full'] or sys.exit('out of memory'); "
            "print('{}')"
        )
        return {
            "op-n1": [*program, "print('warming up'); print('{\"median_s\": 0.5}')"],
            "train-titan": [*program, train],
            "train-base": [*program, "raise ValueError('no such device')"],
        }

    monkeypatch.setattr(bench_gpu, "commands", broken)
    monkeypatch.setattr(bench_gpu, "_describe", str)
    report = bench_gpu.bench_gpu(tmp_path)
    assert report == json.loads((tmp_path / "gpu.json").read_text())
    parts = report["parts"]
    assert parts["op-n1"] == {"median_s": 0.5}
    assert parts["train-titan"] == {"without_remat": {"failed": "exit status 1: out of memory"}}
    assert "no such device" in parts["train-base"]["failed"]
    assert not report["passed"]
    late = bench_gpu.bench_gpu(tmp_path, minutes=0)
    assert "no time was left" in late["parts"]["op-n1"]["skipped"]
    warns = "import warnings; warnings.warn('kernels fail'); print('{}')"
    part = bench_gpu._run_part([sys.executable, "-c", warns], 60, os.environ)
    assert part == {"warnings": ["<string>:1: UserWarning: kernels fail"]}
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert "did not finish" in bench_gpu._run_part(endless, 0.1, os.environ)["failed"]
    lines = '{"a": 1}\n{"a": 2}\n{"a'
    reports = f"import time; print({lines!r}, end='', flush=True); time.sleep(99)"
    part = bench_gpu._run_part([sys.executable, "-c", reports], 2, os.environ)
    assert part == {"a": 2, "stopped": "did not finish in 2 s"}
    with pytest.raises(ValueError, match="there is no part op-n3; there are op-n1, "):
        bench_gpu.bench_gpu(tmp_path, only=("op-n3",))


def test_a_peer_that_is_not_there_says_why(project_dir, tmp_path, monkeypatch):
    assert fla_operator.reason_to_skip() is not None
    arguments = {"smoke": True, "only": ("fla",)}
    monkeypatch.chdir(project_dir)
    assert "are needed" in bench_gpu.bench_gpu(tmp_path, **arguments)["parts"]["fla"]["skipped"]
    monkeypatch.chdir(tmp_path)
    report = bench_gpu.bench_gpu(tmp_path, **arguments)
    assert "not in the working directory" in report["parts"]["fla"]["skipped"]
    assert report["passed"]
