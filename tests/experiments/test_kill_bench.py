"""``bench kills`` and ``bench saves``: what they count, on a stage of a few numbers."""

import json
import shutil
import sys
from dataclasses import dataclass

import pytest

from convert.command_line import run_command
from experiments.bench import COMMANDS
from experiments.benchmarks import kills
from experiments.benchmarks.kills import KillWork, bench_kills, compare_runs
from tests.experiments.test_kills import CHILD, STEPS, run_stage

# The first start never ends by itself before it is killed, on the fastest machine, too.
LINGER = """
import os, time
if not os.path.exists(sys.argv[3]):
    open(sys.argv[3], "w").close()
    time.sleep(30)
"""


@dataclass(frozen=True, kw_only=True)
class FewNumbers(KillWork):
    """The stage of test_kills in place of a run."""

    project: str

    def command(self, output):
        marker = output.parent / "started"
        return [sys.executable, "-c", CHILD + LINGER, str(output), self.project, str(marker)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_stage(folder)
    return folder


def test_a_run_is_killed_until_it_is_complete(whole, tmp_path, project_dir):
    shutil.copytree(whole, tmp_path / "undisturbed")
    work = FewNumbers(project=str(project_dir), steps=STEPS, minutes=0.2, between=(2.0, 7.0))
    report = bench_kills(work, tmp_path, undisturbed=False)
    assert report["kills"] > 0
    assert report["failed_starts"] == 0
    assert (report["lost_steps"], report["different_losses"], report["different_arrays"]) == (
        0,
    ) * 3
    assert report["arrays"] > 4
    assert report["passed"]
    assert json.loads((tmp_path / "kills.json").read_text()) == report


def test_what_differs_is_counted(whole, tmp_path):
    damaged = tmp_path / "killed"
    shutil.copytree(whole, damaged)
    metrics = damaged / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    values = json.loads(lines[3])
    lines[3] = json.dumps(values | {"loss": values["loss"] * (1 + 2**-40)})
    metrics.write_text("\n".join(lines[:-1]) + "\n")
    shutil.rmtree(damaged / "checkpoints" / str(STEPS))
    found = compare_runs(whole, damaged)
    assert found["lost_steps"] == 1
    assert found["different_losses"] == 1
    assert found["different_arrays"] > 2


def test_a_run_that_cannot_start_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        KillWork, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    with pytest.raises(ValueError, match=r"ended with status 3: .*killed\.log says why"):
        kills._kill_until_complete(KillWork(), tmp_path / "killed", tmp_path / "killed.log")


def test_the_cost_of_a_checkpoint(capsys):
    tiny = "--random-weights tiny --tokens 12 --batch 1 --window 4 --steps 2 --repeats 2"
    assert run_command(COMMANDS, ["saves", *tiny.split(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["with_save_s"] > result["copy_s"] > 0
    assert result["without_s"] > 0
    assert result["write_s"] > 0
    assert result["checkpoint_bytes"] > 1000


def test_what_is_missing_is_named_before_anything_is_run(tmp_path, capsys):
    assert run_command(COMMANDS, ["kills", "--no-undisturbed", "--output", str(tmp_path)]) == 2
    assert "undisturbed has no run of 2000 steps to compare with" in capsys.readouterr().err
    assert run_command(COMMANDS, ["saves", "--folder", str(tmp_path / "x")]) == 2
    assert "x is no directory: name one on the disk" in capsys.readouterr().err


def test_times_out_of_order_are_refused(capsys):
    assert run_command(COMMANDS, ["kills", "--between", "9", "3"]) == 2
    assert "between = 9.0 3.0" in capsys.readouterr().err
