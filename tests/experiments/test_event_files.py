"""TensorBoard's event files, and the trackers beside them."""

import logging
import struct
import sys
from types import SimpleNamespace

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from experiments.training import event_files
from experiments.training.event_files import EventFile, read_frames
from experiments.training.metrics import StepRecord
from experiments.training.trackers import Trackers, import_trackers, open_trackers, scalars

# Written by tensorboardX 2.6.5: a version, and step 300 with loss 2.25 and eval_loss -0, at 1.5 s.
GOLDEN = bytes.fromhex(
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "2d000000000000003c418afb09000000000000f83f10ac022a1f0a0b0a046c6f737315000010400a"
    "100a096576616c5f6c6f73731500000080aef2c5ed"
)


@pytest.fixture(scope="module")
def event_class():
    """`Event` of TensorFlow's event.proto, as far as it is used."""
    kinds = {"double": 1, "float": 2, "int64": 3, "string": 9, "message": 11, "int32": 5}
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", syntax="proto3")
    for name, fields in {
        "Value": [("tag", 1, "string", ""), ("simple_value", 2, "float", "")],
        "Summary": [("value", 1, "message", ".Value")],
        "SessionLog": [("status", 1, "int32", "")],
        "Event": [
            *(("wall_time", 1, "double", ""), ("step", 2, "int64", "")),
            *(("file_version", 3, "string", ""), ("summary", 5, "message", ".Summary")),
            ("session_log", 7, "message", ".SessionLog"),
        ],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in fields:
            label = 3 if name == "Summary" else 1
            message.field.add(
                name=field, number=number, label=label, type=kinds[kind], type_name=of or None
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Event"))


def read(folder, event_class):
    """Step and tag of every value in a folder's event files, by TensorBoard's order of files."""
    events = [
        event_class.FromString(frame)
        for file in sorted(folder.glob("events.out.tfevents.*"))
        for frame in read_frames(file.read_bytes())
    ]
    return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]


def test_files_are_byte_for_byte_those_of_tensorboardx(tmp_path, monkeypatch):
    monkeypatch.setattr(event_files.time, "time", lambda: 1.5)
    events = EventFile(tmp_path)
    events.log(300, {"loss": 2.25, "eval_loss": -0.0})
    events.close()
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == GOLDEN


def test_a_resumed_run_has_every_step_once(tmp_path, event_class):
    first = EventFile(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": step / 2, "huge": 1e300})
    first.close()
    (file,) = tmp_path.iterdir()
    # As a killed process leaves it, in the middle of step 5.
    file.write_bytes(file.read_bytes()[:-7])
    resumed = EventFile(tmp_path, resume_step=3)
    resumed.log(4, {"loss": 2.0})
    resumed.close()
    found = read(tmp_path, event_class)
    assert [(step, value) for step, tag, value in found if tag == "loss"] == [
        (step, step / 2) for step in range(1, 5)
    ]
    assert found[1][2] == struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    EventFile(tmp_path).close()
    assert read(tmp_path, event_class) == [], "a run that starts again has no earlier steps"


RECORD = StepRecord(
    step=3,
    loss=0.5,
    tokens_per_s=10.0,
    seconds=0.1,
    grad_norm=float("nan"),
    memory={"layer": [0, 2], "share": [0.25, None], "half_life": [3.0, 4.0]},
)


def test_metrics_are_finite_numbers_with_one_for_each_layer():
    assert scalars(RECORD) == {
        "loss": 0.5,
        "tokens_per_s": 10.0,
        "seconds": 0.1,
        "memory_share/layer_00": 0.25,
        "memory_half_life/layer_00": 3.0,
        "memory_half_life/layer_02": 4.0,
    }
    fitted = StepRecord(step=1, loss=0.7, tokens_per_s=1.0, seconds=1.0, gap_left=[0.8, 0.6])
    assert scalars(fitted).items() >= {
        *(("gap_left", 0.7), ("gap_left/layer_00", 0.8), ("gap_left/layer_01", 0.6))
    }
    assert "loss" not in scalars(fitted)


class Service:
    """Stands in for the modules wandb and trackio, and for a user's tracker."""

    def __init__(self):
        self.begun, self.steps, self.ended = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None, log=self.log, finish=self.finish
        )

    def log(self, metrics, step=None):
        self.steps.append(metrics["train/step"] if step is None else step)

    def finish(self):
        self.ended += 1


class Own:
    def __init__(self):
        self.steps, self.ended = [], 0

    def log(self, step, metrics):
        assert metrics["train/loss"] == 0.5
        self.steps.append(step)

    def close(self):
        self.ended += 1


def test_trackers_get_every_step_once_over_calls(tmp_path, monkeypatch):
    wandb, trackio, own = Service(), Service(), Own()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    output = tmp_path / "mine"
    output.mkdir()

    def call(steps, logged, *, is_continued):
        modules = import_trackers(("wandb", "trackio"))
        opened = open_trackers(modules, [own], output, {"seed": 3}, is_continued=is_continued)
        with opened as trackers:
            stage = trackers.of_stage("train", logged)
            for step in steps:
                stage.log(step, {"loss": 0.5})

    call([1, 2, 3], 0, is_continued=False)
    # The state after step 2 was the last one saved; step 3 had been logged.
    call([3, 4], 3, is_continued=True)
    for each in (wandb, trackio, own):
        assert each.steps == [1, 2, 3, 4]
        assert each.ended == 2
    first, second = wandb.begun
    assert first["id"] == second["id"]
    assert first["config"] == {"seed": 3}
    assert {each["name"] for each in wandb.begun} == {"mine"}
    assert len({each["name"] for each in trackio.begun}) == 1
    # Another run in the same folder is another run of the services.
    call([1], 4, is_continued=False)
    assert wandb.begun[2]["id"] != first["id"]
    assert own.steps[-1] == 1


def test_a_tracker_is_closed_when_a_run_fails(tmp_path):
    own = Own()
    with (
        pytest.raises(OSError, match="full"),
        open_trackers({}, [own], tmp_path, {}, is_continued=False),
    ):
        raise OSError("full")
    assert own.ended == 1
    assert Trackers().of_stage("train", 0).log(1, {}) is None


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--trackers wandb needs .*pip install 'tptt-jax\[wandb"):
        import_trackers(("wandb",))


def test_a_service_that_cannot_start_is_named(tmp_path):
    module = SimpleNamespace(init=lambda **_: 1 / 0)
    message = r"--trackers wandb cannot start \(division by zero\): run `wandb login`"
    with (
        pytest.raises(ValueError, match=message),
        open_trackers({"wandb": module}, [], tmp_path, {}, is_continued=False),
    ):
        pass


def test_a_run_goes_on_without_a_service_that_fails(tmp_path, caplog, monkeypatch):
    wandb, own = Service(), Own()
    monkeypatch.setattr(wandb, "log", lambda metrics: 1 / 0)
    opened = open_trackers({"wandb": wandb}, [own], tmp_path, {}, is_continued=False)
    with caplog.at_level(logging.WARNING, "tptt_jax.trackers"), opened as trackers:
        for step in (1, 2):
            trackers.of_stage("train", 0).log(step, {"loss": 0.5})
    assert own.steps == [1, 2]
    assert caplog.messages == [
        "wandb gets no more metrics (division by zero); those of all steps are in metrics.jsonl"
    ]
