"""Every family trains with a memory and adapters, and exports without them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained
from convert.families import family_of
from convert.families.fields import Fields
from convert.loading import variables_of
from tests.contracts import logits_of, random_tokens, randomize
from tests.convert.published import openelm
from tests.convert.tiny_families import CONFIGS
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig, generate
from tptt_jax.config.memory import memory_layers
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

OPENELM = openelm("270M") | {
    **{"vocab_size": 101, "model_dim": 32, "head_dim": 8, "num_transformer_layers": 2},
    **{"num_query_heads": [2, 4], "num_kv_heads": [1, 2], "ffn_multipliers": [0.5, 1.0]},
    "ffn_dim_divisor": 8,
}
FAMILIES = {
    name: config.to_dict() | {"model_type": config.model_type}
    for name, config in CONFIGS.items()
    if "," not in name
} | {"openelm": OPENELM}


def tiny(content) -> ModelConfig:
    family = family_of(content["model_type"])
    return family.read_config(Fields(json.loads(json.dumps(content)), "config.json"))


@pytest.mark.parametrize("content", FAMILIES.values(), ids=FAMILIES)
def test_learns_and_goes_back(tmp_path, content):
    base = randomize(CausalLM(tiny(content), rngs=nnx.Rngs(0)))
    export_pretrained(base, tmp_path / "base")
    model = load_pretrained(
        tmp_path / "base", LizaConfig(softmax_window=5, softmax_sinks=1), LoraConfig(rank=2)
    )
    partition, trainable, share = split_trainable(model, "lora")
    kinds = {name.rsplit(".", 2)[-2] for name in trainable if ".memory." not in name}
    # Of Gemma every layer has a window of its own here, and loses nothing.
    shares = {"mag"} if memory_layers(model.config, model.liza) else set()
    assert kinds == {"lora"} | shares, "adapters on attention, shares, the memory, nothing else"
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 8, partition)
    step = make_train_step(partition, optimizer, dropout=False)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    tokens = jnp.asarray(random_tokens((2, 12), vocab_size=101))
    batch = Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))
    before = jax.tree.map(np.array, partition.frozen)
    losses = []
    for _ in range(8):
        state, metrics = step(state, partition.frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, partition.frozen, before)

    tuned = partition.merge(state.trainable, state.share, partition.frozen)
    export_pretrained(tuned, tmp_path / "merged", source=tmp_path / "base")
    merged, plain, trained = (
        {name: np.asarray(x.get_value()) for name, (_, x) in variables_of(each).items()}
        for each in (load_pretrained(tmp_path / "merged"), base, tuned)
    )
    for name, value in plain.items():
        adapter = name.removesuffix(".kernel") + ".lora"
        if f"{adapter}.a" in trained:
            delta = model.lora.scale * trained[f"{adapter}.a"] @ trained[f"{adapter}.b"]
            assert np.abs(delta).max() > 1e-3
            value = value + delta
        np.testing.assert_allclose(merged[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", ["openelm", "olmoe", "gpt2"])
def test_decodes_as_it_reads(family):
    liza = LizaConfig(softmax_window=5, softmax_sinks=1)
    model = randomize(CausalLM(tiny(FAMILIES[family]), liza, rngs=nnx.Rngs(0)))
    tokens = random_tokens((1, 9), vocab_size=101)
    new = np.asarray(generate(model, tokens, 6, stop_tokens=()).tokens)
    row = np.concatenate([tokens, new], axis=1)
    np.testing.assert_array_equal(np.argmax(logits_of(model, row[:, :-1])[:, 8:], axis=-1), new)
