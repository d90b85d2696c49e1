"""Damaged files beside a run's checkpoints: one line that names the file, no traceback, no wait."""

import json
import os

import pytest

from experiments.evaluation.store import RowStore
from experiments.training.event_files import EventFile
from experiments.training.measurements import read_measurements
from experiments.training.metrics import MetricsWriter, read_metrics
from experiments.training.resume.record import Record
from experiments.training.resume.settings import saved_settings
from tptt_jax.durable import atomic_file

RECORD = {"format": "tptt_jax run 1", "seed": 0}
CHANGE = {"step": 1, "name": "seed", "before": "0", "now": "1"}
STEP = {"step": 1, "loss": 2.0, "tokens_per_s": 3.0, "seconds": 4.0}
READERS = {
    "run.json": lambda file: Record.read(file.parent),
    "config.yaml": lambda file: saved_settings(file.parent),
    "evaluation.json": read_measurements,
    "metrics.jsonl": read_metrics,
    "rows.jsonl": RowStore,
    "events.out.tfevents.1.x.tptt_jax": lambda file: EventFile(file.parent),
}


def test_sound_files_are_read(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RECORD | {"data": {"name": "x"}, "changes": [CHANGE]}))
    record = Record.read(tmp_path)
    assert record is not None
    assert record.notes() == "# after step 1, by --resume-allow: seed 0 -> 1\n"
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(STEP) + "\n" + json.dumps(STEP | {"step": 2, "loss": None}) + "\n")
    assert [record.step for record in read_metrics(file)] == [1, 2]
    file = tmp_path / "rows.jsonl"
    file.write_text('{"key": "a", "result": {"x": 1}}\n{"key": "b", "re')
    assert RowStore(file).get("a") == {"x": 1}
    assert file.read_text().endswith("}}\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", RECORD | {"seed": "x"}, "is damaged .*seed .*remove it"),
        ("run.json", RECORD | {"base": ["x"]}, "is damaged .*base .*remove it"),
        ("run.json", RECORD | {"data": {"bytes": 1}}, "is damaged .*name.*remove it"),
        ("run.json", RECORD | {"changes": [{}]}, "is damaged .*step.*remove it"),
        ("config.yaml", "", "is empty: remove it to resume without comparison"),
        ("evaluation.json", "", "is not valid JSON.*Remove it to measure again"),
        ("evaluation.json", [1], "must hold a JSON object.*Remove it to measure again"),
        ("evaluation.json", {"before": {"nats": [1]}}, "is damaged .*counts.*remove it"),
        ("evaluation.json", {"after": [1]}, "is damaged .*remove it"),
        (
            *("evaluation.json", {"after": {"nats": [1.0], "counts": [1, 2]}}),
            "is damaged .*remove it",
        ),
        ("metrics.jsonl", b"\xff\xfe{\n", "line 1, holds no metrics of a step: remove the line"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1, holds no metrics of a step"),
        ("metrics.jsonl", json.dumps(STEP | {"step": "1"}) + "\n", "line 1, holds no metrics"),
        ("metrics.jsonl", json.dumps(STEP | {"loss": "1"}) + "\n", "line 1, holds no metrics"),
        ("rows.jsonl", '{"key": "a", "result": {}}\n[1]\n', "line 2, holds no result of a row"),
        ("rows.jsonl", b"\xff\n", "line 1, holds no result of a row: remove the line"),
        ("rows.jsonl", '{"key": 1, "result": []}\n', "line 1, holds no result of a row"),
    ],
)
def test_a_damaged_file_is_refused_by_name(name, content, message, tmp_path):
    file = tmp_path / name
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        READERS[name](file)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_without_waiting(name, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a .*must be a regular file"):
        READERS[name](tmp_path / name)


def test_steps_are_not_appended_to_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl is a pipe"):
        MetricsWriter(tmp_path / "metrics.jsonl")


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(ValueError, match="pipe is a pipe, a device"),
        atomic_file(tmp_path / "pipe"),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_an_error_of_writing_names_the_file_and_not_the_temporary_one(tmp_path):
    target = tmp_path / "results.json"
    target.mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_file(target) as temporary:
        temporary.write_text("{}")
    assert caught.value.filename == str(target)
    assert list(tmp_path.iterdir()) == [target]
