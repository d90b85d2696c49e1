import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.training.checkpoint import RunCheckpoints, latest_step, restore_trainable
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

LIZA = LizaConfig(writes="all", mag="scheduled", operator="gated_delta_product")
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19))
BATCH = Batch(jnp.asarray(TOKENS), jnp.ones((2, 19), jnp.int32), jnp.ones((2, 19), bool))


@pytest.fixture(scope="module")
def setting():
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step = make_train_step(partition, optimizer, mag_schedule=MagSchedule())

    def initial():
        return init_train_state(trainable, share, optimizer, jax.random.key(0))

    return model, partition, step, initial


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
    fresh = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    assert restore_trainable(tmp_path, fresh) == 3
    tuned = partition.merge(state.trainable, state.share, partition.frozen)
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_array_equal(fresh(tokens).logits, tuned(tokens).logits)
    assert float(fresh.mag_share.get_value()) == float(state.share)


def test_another_run_s_checkpoint_does_not_fit(setting, tmp_path):
    _, _, _, initial = setting
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(initial())
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(rank=3), rngs=nnx.Rngs(0))
    _, trainable, share = split_trainable(model, "lora")
    other = init_train_state(
        trainable, share, make_optimizer(OptimizerConfig(), 10), jax.random.key(0)
    )
    with RunCheckpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="another --out"):
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
        restore_trainable(tmp_path, CausalLM(ModelConfig.tiny(), rngs=nnx.Rngs(0)))
