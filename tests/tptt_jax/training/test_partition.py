import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts import logits_of, random_tokens
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import load_trainable, split_trainable
from tptt_jax.training.schedules import MagSchedule
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

LIZA = LizaConfig(writes="all", memory_rank=2)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19))
BATCH = Batch(jnp.asarray(TOKENS), jnp.ones((2, 19), jnp.int32), jnp.ones((2, 19), bool))


def train(model, mode, steps=3, schedule=None, **optimizer_options):
    partition, trainable, share = split_trainable(model, mode)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-2, **optimizer_options), 10, partition
    )
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    step = make_train_step(partition, optimizer, mag_schedule=schedule)
    metrics = []
    for _ in range(steps):
        state, each = step(state, partition.frozen, BATCH)
        metrics.append(each)
    return partition, trainable, state, metrics, step


def last_names(names):
    return {".".join(name.split(".")[-2:]) for name in names}


def test_modes_train_what_they_say():
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    names = {
        mode: split_trainable(model, mode)[1].keys() for mode in ("lora", "projections", "full")
    }
    assert last_names(names["lora"]) == {
        *("lora.a", "lora.b", "mag.logit"),
        *(f"{x}_delta.{y}" for x in "qkv" for y in "ab"),
    }
    added = names["projections"] - names["lora"]
    assert last_names(added) == {f"{x}_proj.kernel" for x in "qkvo"}
    everything = {
        ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    assert set(names["full"]) == everything


@pytest.mark.parametrize("mode", ["lora", "projections", "full"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_frozen_leaves_are_bit_equal_and_trained_ones_move(mode, dtype):
    lora = LoraConfig() if mode == "lora" else None
    model = CausalLM(ModelConfig.tiny(), LIZA, lora, dtype=dtype, rngs=nnx.Rngs(0))
    before = {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(model))}
    partition, trainable, state, metrics, _ = train(model, mode)
    assert metrics[-1].loss < metrics[0].loss
    tuned = partition.merge(state.trainable, state.share, partition.frozen)
    for path, variable in nnx.to_flat_state(nnx.state(tuned)):
        after, name = np.asarray(variable.get_value()), ".".join(map(str, path))
        if name in trainable:
            assert after.dtype == np.float32
            assert not np.array_equal(after, before[path].astype(np.float32)), name
        else:
            assert after.dtype == before[path].dtype
            assert np.array_equal(after.view(np.uint8), before[path].view(np.uint8)), name


def test_optimizer_holds_nothing_for_frozen_leaves():
    model = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(), rngs=nnx.Rngs(0))
    _, trainable, state, *_ = train(model, "lora", steps=1)
    held = sum(x.size for x in jax.tree.leaves(state.opt_state))
    wanted = sum(x.size for x in trainable.values())
    assert 2 * wanted <= held <= 2 * wanted + 16


def test_weight_decay_spares_norms_and_shares():
    model = CausalLM(ModelConfig.tiny(), LIZA, None, rngs=nnx.Rngs(0))
    results = [
        train(model, "full", steps=1, weight_decay=decay)[2].trainable for decay in (0.0, 10.0)
    ]
    decayed = {
        name.rsplit(".", 2)[-1]
        for name in results[0]
        if not np.array_equal(results[0][name], results[1][name])
    }
    same = {
        name.rsplit(".", 1)[-1]
        for name in results[0]
        if np.array_equal(results[0][name], results[1][name])
    }
    assert decayed <= {"kernel", "embedding", "a"}
    assert {"weight", "logit"} <= same


def test_scheduled_share_moves_without_recompiling_and_is_kept():
    liza = LizaConfig(writes="all", mag="scheduled", mag_init=0.01)
    model = CausalLM(ModelConfig.tiny(), liza, LoraConfig(), rngs=nnx.Rngs(0))
    schedule = MagSchedule(kind="gradual", start=0.01, end=0.5, steps=2)
    *_, state, metrics, step = train(model, "lora", steps=4, schedule=schedule)
    shares = [float(each.mu_mean) for each in metrics]
    np.testing.assert_allclose(shares, [0.01, 0.255, 0.5, 0.5], rtol=1e-6)
    assert step._cache_size() == 1
    assert float(state.share) == 0.5
    load_trainable(model, dict(state.trainable), state.share)
    assert float(model.mag_share.get_value()) == 0.5


def test_loading_into_another_model_is_an_error():
    source = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(rank=4), rngs=nnx.Rngs(0))
    target = CausalLM(ModelConfig.tiny(), LIZA, LoraConfig(rank=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"has shape .* the model expects"):
        load_trainable(target, split_trainable(source, "lora")[1], None)


def test_nothing_to_train_is_an_error():
    model = CausalLM(ModelConfig.tiny(), None, None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing to train"):
        split_trainable(model, "lora")


def test_frozen_adapters_belong_to_what_the_memory_is_fitted_to():
    liza = LizaConfig(softmax_window=32, softmax_sinks=0, memory_rank=2)
    model = CausalLM(ModelConfig.tiny(num_layers=1), liza, LoraConfig(rank=2), rngs=nnx.Rngs(0))
    lora = model.stacks[0].self_attn.q_proj.lora
    lora.b[...] = jnp.ones_like(lora.b[...])
    # Nothing leaves the window: a student whose teacher is the same model has no divergence.
    tokens = jnp.asarray(random_tokens((1, 16)))
    batch = Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))
    losses = {}
    for mode in ("memory", "lora"):
        partition, trainable, _ = split_trainable(model, mode)
        optimizer = make_optimizer(OptimizerConfig(), 1, partition)
        step = make_train_step(partition, optimizer, distill=1.0, dropout=False)
        state = init_train_state(trainable, None, optimizer, jax.random.key(0))
        losses[mode] = float(step(state, partition.frozen, batch)[1].loss)
    assert losses["memory"] == pytest.approx(0, abs=1e-6)
    assert losses["lora"] > 1e-4


def test_a_step_leaves_the_callers_share_and_key_alone():
    """The step donates its state: what the model and the caller hold must not be part of it."""
    liza = LizaConfig(writes="all", mag="scheduled", mag_init=0.3)
    model = CausalLM(ModelConfig.tiny(num_layers=1), liza, LoraConfig(), rngs=nnx.Rngs(0))
    want = logits_of(model, TOKENS)
    partition, trainable, share = split_trainable(model, "lora")
    optimizer, key = make_optimizer(OptimizerConfig(), 10, partition), jax.random.key(3)
    state = init_train_state(trainable, share, optimizer, key)
    step = make_train_step(partition, optimizer, mag_schedule=MagSchedule())
    state, _ = step(state, partition.frozen, BATCH)
    assert float(model.mag_share[...]) == pytest.approx(0.3)
    np.testing.assert_array_equal(logits_of(model, TOKENS), want)
    assert jax.random.key_data(key).shape == (2,)
    load_trainable(model, state.trainable, state.share)
    assert float(model.mag_share[...]) == pytest.approx(float(state.share))
    assert np.isfinite(logits_of(model, TOKENS)).all()
