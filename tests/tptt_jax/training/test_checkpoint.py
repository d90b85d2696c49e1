import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.contracts import logits_of
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.training import checkpoint, run_checkpoints
from tptt_jax.training.checkpoint import (
    RunCheckpoints,
    latest_sound_step,
    latest_step,
    remove_checkpoints,
    restore_trainable,
)
from tptt_jax.training.description import (
    Description,
    is_checkpoint,
    read_description,
    write_description,
)
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.schedules import MagSchedule
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

# What is trained matters here, not what it computes.
TINY = ModelConfig.tiny(num_layers=2, mlp_dim=16)
LIZA = LizaConfig(writes="all", mag="scheduled", operator="gated_delta_rule")
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19))
BATCH = Batch(jnp.asarray(TOKENS), jnp.ones((2, 19), jnp.int32), jnp.ones((2, 19), bool))


@pytest.fixture(scope="module")
def setting():
    model = CausalLM(TINY, LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = make_optimizer(OptimizerConfig(), 10, partition)
    step = make_train_step(partition, optimizer, mag_schedule=MagSchedule())

    def initial():
        return init_train_state(trainable, share, optimizer, jax.random.key(0))

    return model, partition, step, initial


@pytest.fixture(scope="module")
def plain():
    """Parameters and a loss without a memory, whose step compiles in less time."""
    model = CausalLM(TINY, None, LoraConfig(), rngs=nnx.Rngs(0))
    partition, trainable, _ = split_trainable(model, "lora")
    return partition, trainable


def test_a_resumed_run_goes_on_bit_for_bit(setting, tmp_path):
    _, partition, step, initial = setting
    state = initial()
    for _ in range(2):
        state, _ = step(state, partition.frozen, BATCH)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    for _ in range(2):
        state, metrics = step(state, partition.frozen, BATCH)
    with RunCheckpoints(tmp_path) as checkpoints:
        resumed = checkpoints.restore(initial())
    assert int(resumed.step) == 2
    for _ in range(2):
        resumed, again = step(resumed, partition.frozen, BATCH)
    assert [float(x) for x in metrics] == [float(x) for x in again]
    for name, value in state.trainable.items():
        assert np.array_equal(value, resumed.trainable[name]), name
    assert float(state.share) == float(resumed.share)


def test_the_logging_of_others_stays(setting, tmp_path):
    filters = list(logging.getLogger("absl").filters)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(setting[3]())
        checkpoints.wait()
        checkpoints.restore(setting[3]())
    assert logging.getLogger("absl").filters == filters == []


def test_a_half_written_step_is_not_a_checkpoint(setting, tmp_path):
    _, partition, step, initial = setting
    state, _ = step(initial(), partition.frozen, BATCH)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    # What a kill in the middle of step 2 leaves behind: a temporary name.
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert latest_step(tmp_path) == 1
    with RunCheckpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(initial()).step) == 1


def test_trained_values_go_into_a_fresh_model(setting, tmp_path):
    _, partition, step, initial = setting
    state = initial()
    for _ in range(3):
        state, _ = step(state, partition.frozen, BATCH)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    fresh = CausalLM(TINY, LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    assert restore_trainable(tmp_path, fresh) == 3
    tuned = partition.merge(state.trainable, state.share, partition.frozen)
    np.testing.assert_array_equal(logits_of(fresh, TOKENS), logits_of(tuned, TOKENS))
    assert float(fresh.mag_share.get_value()) == float(state.share)


def test_another_run_s_checkpoint_does_not_fit(setting, tmp_path):
    _, _, _, initial = setting
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(initial())
    model = CausalLM(TINY, LIZA, LoraConfig(rank=3), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    other = init_train_state(
        trainable, share, make_optimizer(OptimizerConfig(), 10, partition), jax.random.key(0)
    )
    with (
        RunCheckpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"must have shape .*: use another --out"),
    ):
        checkpoints.restore(other)


def test_description_round_trip(tmp_path):
    description = Description(source="demo", liza=LIZA, lora=None, train="full", dtype="bfloat16")
    assert not is_checkpoint(tmp_path)
    write_description(tmp_path, description)
    assert is_checkpoint(tmp_path)
    assert read_description(tmp_path) == description


def test_a_description_from_before_precision_was_a_choice(tmp_path):
    description = Description(source="demo", liza=LIZA, lora=None, train="lora")
    values = json.loads(description.to_json())
    assert values["liza"].pop("precision") == "auto"
    (tmp_path / "checkpoint.json").write_text(json.dumps(values))
    assert read_description(tmp_path) == description


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", json.dumps({"format": "tptt_jax checkpoint 1", "x": 1})]
)
def test_a_foreign_description_is_refused(tmp_path, content):
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match="is not the description of a checkpoint"):
        read_description(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        restore_trainable(tmp_path, CausalLM(TINY, rngs=nnx.Rngs(0)))


# --- damage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(setting, tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    _, partition, step, initial = setting
    folder, state = tmp_path_factory.mktemp("two") / "run", initial()
    with RunCheckpoints(folder) as checkpoints:
        for _ in range(2):
            state, _ = step(state, partition.frozen, BATCH)
            checkpoints.save(state)
            if int(state.step) == 1:
                first = {name: np.array(value) for name, value in state.trainable.items()}
    return folder, first


@pytest.fixture
def saved(two_steps, tmp_path):
    """A copy to damage, in a folder whose name is a pattern."""
    folder, first = two_steps
    return shutil.copytree(folder, tmp_path / "exp[1] *"), first


def data_file(folder):
    return max((folder / "weights").rglob("*"), key=lambda file: file.stat().st_size)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGE = {
    "deleted file": lambda folder: data_file(folder).unlink(),
    "deleted folder": lambda folder: shutil.rmtree(folder / "weights"),
    "empty": lambda folder: data_file(folder).write_bytes(b""),
    "truncated": lambda folder: os.truncate(
        data_file(folder), data_file(folder).stat().st_size - 9
    ),
    "flipped byte": lambda folder: flip(data_file(folder)),
    "manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "no manifest": lambda folder: (
        (folder / "manifest.json").unlink(),
        (folder / "weights" / "manifest.ocdbt").unlink(),
    ),
}


# orbax stops at the first array that is missing and leaves the reads of the others behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(kind, saved, setting, caplog):
    folder, first = saved
    DAMAGE[kind](folder / "checkpoints" / "2")
    fresh = CausalLM(TINY, LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    assert restore_trainable(folder, fresh) == 1
    _, loaded, _ = split_trainable(fresh, "lora")
    assert all(np.array_equal(loaded[name], first[name]) for name in first)
    (record,) = caplog.records
    assert "checkpoint 2 in " in record.getMessage()
    assert "taking that of step 1" in record.getMessage()
    with RunCheckpoints(folder) as checkpoints:
        assert int(checkpoints.restore(setting[3]()).step) == 1
    DAMAGE[kind](folder / "checkpoints" / "1")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .step 2: .*; step 1: "):
        restore_trainable(folder, fresh)


def test_a_damaged_step_is_written_anew(saved, setting):
    folder, _ = saved
    _, partition, step, initial = setting
    flip(data_file(folder / "checkpoints" / "2"))
    with RunCheckpoints(folder) as checkpoints:
        state = checkpoints.restore(initial())
        state, _ = step(state, partition.frozen, BATCH)
        checkpoints.save(state)
    fresh = CausalLM(TINY, LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    assert restore_trainable(folder, fresh) == 2
    assert sorted(each.name for each in (folder / "checkpoints").iterdir()) == ["1", "2"]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), None),
        (
            ValueError("RESOURCE_EXHAUSTED: out of memory"),
            r"2 in .* is intact but .*\(RESOURCE",
        ),
        (OSError(errno.EMFILE, "Too many open files"), r"is intact but could not be read \(.*Too"),
    ],
    ids=["memory", "device", "files"],
)
def test_a_passing_failure_costs_no_checkpoint(error, expected, saved, setting, monkeypatch):
    folder, _ = saved
    fresh = CausalLM(TINY, LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    kind = MemoryError if isinstance(error, MemoryError) else OSError
    with RunCheckpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            for module in (checkpoint, run_checkpoints):
                patch.setattr(module, "read_trees", failing(error))
            with pytest.raises(kind, match=expected):
                restore_trainable(folder, fresh)
            with pytest.raises(kind, match=expected):
                checkpoints.restore(setting[3]())
        assert int(checkpoints.restore(setting[3]()).step) == 2


@pytest.mark.parametrize(
    "name", ["tptt_jax.training.step_folders._digest", "pathlib.Path.read_text"]
)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_out_of_reach_is_not_damaged(name, number, saved, monkeypatch):
    folder, _ = saved
    error = OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(name, failing(error))
        if number == errno.EACCES:
            with pytest.raises(OSError, match="Permission denied"):
                latest_sound_step(folder)
        else:
            assert latest_sound_step(folder) is None
    assert latest_sound_step(folder) == 2


def test_only_damaged_steps_are_removed(saved, setting):
    folder, _ = saved
    state = setting[3]()._replace(step=jnp.int32(1))
    with RunCheckpoints(folder) as checkpoints:
        checkpoints.save(state)
    assert latest_step(folder) == 2, "nothing was found wrong with it"
    flip(data_file(folder / "checkpoints" / "2"))
    with RunCheckpoints(folder) as checkpoints:
        state = checkpoints.restore(setting[3]())
        checkpoints.save(state._replace(step=jnp.int32(0)))
    assert latest_step(folder) == 1


def test_a_failed_write_can_be_tried_again(setting, tmp_path, monkeypatch):
    with RunCheckpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr("tptt_jax.training.run_checkpoints.write_trees", failing(OSError("full")))
            checkpoints.save(setting[3]())
            with pytest.raises(OSError, match=r"cannot be written to .* \(full\): make room"):
                checkpoints.wait()
        checkpoints.save(setting[3]())
    assert latest_step(tmp_path) == 0


def test_checking_for_a_failed_write_waits_for_no_process(setting, tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(run_checkpoints, "wait_for_all", places.append)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(setting[-1]())
        while latest_step(tmp_path) is None:
            checkpoints.check()
            time.sleep(0.01)
        checkpoints.check()
        # The others may still be writing, so all meet before the next step is saved.
        assert places == ["checkpoints"]
        checkpoints.wait()
        checkpoints.check()
        assert places == ["checkpoints", "checkpoint"]


def test_an_optimizer_may_hold_infinity(plain, tmp_path):
    partition, trainable = plain
    # As `optax.contrib.reduce_on_plateau` begins, whose best loss is infinite.
    best = optax.GradientTransformation(
        lambda _: (jnp.full((), jnp.inf), jnp.full((), jnp.inf)),
        lambda updates, state, _=None: (updates, (state[0], jnp.minimum(state[1], 1.0))),
    )
    optimizer = optax.chain(optax.sgd(0.1), best)
    state = init_train_state(trainable, None, optimizer, jax.random.key(0))
    step = make_train_step(partition, optimizer)
    state, metrics = step(state, partition.frozen, BATCH)
    assert metrics.is_finite
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        found = checkpoints.restore(state)
    assert [float(x) for x in jax.tree.leaves(found.opt_state)] == [jnp.inf, 1.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_are_not_finite_are_neither_written_nor_loaded(
    dtype, saved, setting, monkeypatch
):
    folder, _ = saved
    state = setting[3]()
    name = next(iter(state.trainable))
    value = state.trainable[name].astype(dtype).at[(0,) * 2].set(jnp.nan)
    broken = state.trainable | {name: value}
    state = state._replace(trainable=broken, step=jnp.int32(3))
    checkpoints = RunCheckpoints(folder)
    checkpoints.save(state)
    with pytest.raises(OSError, match=r"step 3 was not written: .* are not finite. Lower"):
        checkpoints.wait()
    assert latest_step(folder) == 2
    # What a version that wrote them has left.
    with monkeypatch.context() as patch:
        patch.setattr("tptt_jax.training.run_checkpoints.check_finite", lambda tree: None)
        with RunCheckpoints(folder) as checkpoints:
            checkpoints.save(state)
    fresh = CausalLM(TINY, LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    assert restore_trainable(folder, fresh) == 2


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import jax, jax.numpy as jnp, optax
from tptt_jax.training.checkpoint import RunCheckpoints
from tptt_jax.training.train_step import init_train_state
arrays = {f"a{number}": jnp.ones(900) for number in range(40)}
state = init_train_state(arrays, None, optax.adam(1e-3), jax.random.key(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with RunCheckpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(state)
"""


def test_a_full_disk_is_one_error_at_once(tmp_path, project_dir):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(project_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: the checkpoint of step 0 cannot be written to ")
    assert "make room" in last
    assert done.stderr.count("Traceback") <= 3, "the error and its causes, and nobody else's"
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(OSError, match="checkpoints"):
        RunCheckpoints(tmp_path)


def test_only_our_own_files_are_removed(saved):
    folder, _ = saved
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    (folder / "checkpoints" / ".7.partial").mkdir()
    remove_checkpoints(folder)
    assert [each.name for each in (folder / "checkpoints").iterdir()] == ["notes.txt"]


# --- steps that are not finite ---------------------------------------------------------------


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(setting):
    _, partition, step, initial = setting
    state = initial()
    name = next(name for name in state.trainable if name.endswith("lora.a"))
    endless = state.trainable | {name: state.trainable[name] * 1e38 * 10}
    check_skipped(step, state._replace(trainable=endless), partition, loss_is_finite=False)


def test_an_update_that_is_not_finite_leaves_the_state_as_it_was(plain):
    partition, trainable = plain
    endless = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x * jnp.inf, updates))
    optimizer = optax.chain(
        make_optimizer(OptimizerConfig(lr_schedule="constant"), 10, partition), endless
    )
    state = init_train_state(trainable, None, optimizer, jax.random.key(0))
    check_skipped(make_train_step(partition, optimizer), state, partition, loss_is_finite=True)


def check_skipped(step, state, partition, *, loss_is_finite):
    before = {name: np.array(value) for name, value in state.trainable.items()}
    state, metrics = step(state, partition.frozen, BATCH)
    assert not metrics.is_finite
    assert np.isfinite(metrics.loss) == loss_is_finite
    assert int(state.step) == 0
    for name, value in before.items():
        np.testing.assert_array_equal(state.trainable[name], value)
