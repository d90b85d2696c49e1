"""A model whose base is quantised computes what the dequantised one does, in less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.benchmarks.step_memory import step_memory
from tests.contracts import (
    QUICK,
    assert_close,
    assert_trees_close,
    quick_jit,
    random_tokens,
)
from tests.devices import run_on_devices
from tptt_jax import BaseParam, CausalLM, LizaConfig, LoraConfig, ModelConfig, init_cache
from tptt_jax.config import ExpertsConfig
from tptt_jax.layers.quantized import QuantizedWeight, count_parameters
from tptt_jax.model import base_model, replace_memory
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.sharding import sharding_of
from tptt_jax.training.loss import causal_lm_loss
from tptt_jax.training.partition import restore_targets, split_trainable

LIZA = LizaConfig(softmax_window=6, softmax_sinks=1)
CONFIGS = {
    "tied nf4": (ModelConfig.tiny(), "nf4"),
    "experts int8": (
        ModelConfig.tiny(tie_embeddings=False, experts=ExpertsConfig(number=3, per_token=2)),
        "int8",
    ),
}


def build(config: ModelConfig, base_dtype: BaseDtype | None, liza: Any = LIZA) -> CausalLM:
    @quick_jit
    def state():
        lora = LoraConfig(rank=2)
        model = CausalLM(config, liza, lora, base_dtype=base_dtype, rngs=nnx.Rngs(0))
        graphdefs.append(nnx.graphdef(model))
        return nnx.state(model)

    graphdefs: list[Any] = []
    values = state()
    return nnx.merge(graphdefs[0], values)


def dequantized(model: CausalLM) -> CausalLM:
    """The same model with a plain float32 base."""
    plain = nnx.eval_shape(lambda: CausalLM(model.config, model.liza, model.lora, rngs=nnx.Rngs(0)))
    own = dict(nnx.to_flat_state(nnx.state(model)))
    weights = {p: m for p, m in nnx.iter_modules(model) if isinstance(m, QuantizedWeight)}
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(plain)):
        if path in weights:
            flat.append((path, variable.replace(weights[path].get_value().dequantize())))
        else:
            flat.append((path, own[path]))
    return nnx.merge(nnx.graphdef(plain), nnx.from_flat_state(flat))


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def models(request) -> tuple[CausalLM, CausalLM]:
    quantized = build(*request.param)
    partition, trainable, _ = split_trainable(quantized, "lora")
    keys = iter(jax.random.split(jax.random.key(1), len(trainable)))
    moved = {k: v + 0.1 * jax.random.normal(next(keys), v.shape) for k, v in trainable.items()}
    quantized = partition.merge(moved, None, partition.frozen)
    return quantized, dequantized(quantized)


def test_loss_and_gradients_are_those_of_the_dequantised_base(models):
    tokens = random_tokens((2, 15))

    def measure(model):
        partition, trainable, _ = split_trainable(model, "lora")

        def loss(trainable, frozen):
            total, count = causal_lm_loss(partition.merge(trainable, None, frozen), tokens)
            return total / count

        return quick_jit(jax.value_and_grad(loss))(trainable, partition.frozen)

    (loss, gradient), (expected, theirs) = map(measure, models)
    assert_close(loss, expected, 1e-6, "loss")
    assert_trees_close(gradient, theirs, 2e-5, "gradient")


def test_decoding_is_that_of_the_dequantised_base(models):
    tokens = random_tokens((1, 9))

    def read(model):
        graphdef, state = nnx.split(model)

        @quick_jit
        def logits(state, tokens):
            model = nnx.merge(graphdef, state)
            model.stacks = nnx.List(stack.unroll() for stack in model.stacks)
            cache = init_cache(model, 1, 12)
            output = model(tokens[:, :8], cache=cache)
            return output.logits, model(tokens[:, 8:], cache=output.cache).logits

        return logits(state, tokens)

    for found, expected in zip(*map(read, models), strict=True):
        assert_close(found, expected, 1e-5, "logits")


def test_variables_are_frozen_parts_of_the_base(models):
    quantized, plain = models
    of_base = nnx.to_flat_state(nnx.state(quantized, BaseParam))
    assert {str(x.get_value().dtype) for _, x in of_base} >= {"int8", "float16", "float32"}
    added = [dict(nnx.to_flat_state(nnx.state(m, nnx.LoRAParam))).keys() for m in models]
    assert added[0] == added[1]
    assert count_parameters(quantized, nnx.state(quantized)) == count_parameters(
        plain, nnx.state(plain)
    )
    assert base_model(quantized).base_dtype == quantized.base_dtype
    assert replace_memory(quantized, None).base_dtype == quantized.base_dtype
    for mode in ("projections", "full"):
        with pytest.raises(ValueError, match=r"base weights in full precision, not in (nf4|int8)"):
            split_trainable(quantized, mode)
    names = {"stacks.0.self_attn.q_proj.kernel": (1, 2)}
    with pytest.raises(ValueError, match=r"has trained stacks\.0\.\S+ which a base in"):
        restore_targets(quantized, names)


def test_codes_and_scales_are_divided_alike():
    config = ModelConfig.tiny(embed_dim=256, mlp_dim=512, head_dim=32)
    model = nnx.eval_shape(lambda: CausalLM(config, base_dtype="nf4", rngs=nnx.Rngs(0)))
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), ("data", "fsdp", "context", "tensor"))
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantizedWeight):
            specs = [sharding_of(x, mesh).spec for x in (module.codes, module.scales)]
            found[path[-2]] = [tuple(spec) for spec in specs]
    # Of a kernel: layers, blocks of inputs, values of a block, outputs.
    assert found["up_proj"] == [(None, "fsdp", None, "tensor"), (None, "fsdp", "tensor")]
    assert found["down_proj"] == [(None, "tensor", None, "fsdp"), (None, "tensor", "fsdp")]
    assert found["embed"] == [(None, "fsdp", None), (None, "fsdp")]


# Two blocks of inputs and two of the MLP's, so that a mesh of two by two divides them.
SHARDED = """
import jax
from flax import nnx
from tests.contracts import assert_close, assert_trees_close, quick_jit, random_tokens
from tptt_jax import CausalLM, LoraConfig, ModelConfig
from tptt_jax.sharding import make_mesh, shard_model
from tptt_jax.training.loss import causal_lm_loss
from tptt_jax.training.partition import split_trainable

config = ModelConfig.tiny(vocab_size=96, embed_dim=128, mlp_dim=128, num_layers=1)
model = CausalLM(config, None, LoraConfig(rank=2), base_dtype="nf4", rngs=nnx.Rngs(0))
partition, trainable, _ = split_trainable(model, "lora")
moved = {name: value + 0.1 for name, value in trainable.items()}
model = partition.merge(moved, None, partition.frozen)
tokens = random_tokens((2, 8), vocab_size=96)

def measure(model):
    partition, trainable, _ = split_trainable(model, "lora")
    loss = lambda x, frozen: causal_lm_loss(partition.merge(x, None, frozen), tokens)[0]
    return quick_jit(jax.value_and_grad(loss))(trainable, partition.frozen)

loss, gradient = measure(model)
shard_model(model, make_mesh("fsdp=2,tensor=2"))
codes = model.stacks[0].mlp.up_proj.kernel.codes.get_value()
assert codes.addressable_shards[0].data.size == codes.size // 4, codes.sharding
divided, theirs = measure(model)
assert_close(divided, loss, 1e-5, "loss")
assert_trees_close(jax.device_get(theirs), jax.device_get(gradient), 1e-4, "gradient")
"""


def test_a_mesh_computes_the_same(project_dir):
    run_on_devices(4, SHARDED, project_dir)


def step_bytes(config: ModelConfig, base_dtype: BaseDtype | None) -> tuple[int, int]:
    """Bytes of frozen weights, and of all that a compiled step of LoRA training holds."""
    sizes = step_memory(
        config,
        LoraConfig(rank=4),
        (1, 16),
        dtype=jnp.dtype("float32"),
        base_dtype=base_dtype,
        compiler_options=QUICK["compiler_options"],
    )
    return sizes["base_bytes"], sizes["total_bytes"]


def test_a_step_needs_half_of_bfloat16s_memory():
    config = ModelConfig.tiny(
        vocab_size=1024, embed_dim=512, mlp_dim=1536, num_layers=12, num_heads=4, head_dim=128
    )
    base, total = step_bytes(config, "nf4")
    plain, plain_total = step_bytes(config, None)
    # Activations are float32 in both: XLA would convert bfloat16 for a CPU, in more memory.
    half = plain // 2
    assert total <= 0.5 * (plain_total - half)
    assert base < 0.3 * half
    # Beside both bases, nothing but the two largest matrices of one layer is dense at a time.
    assert (total - base) - (plain_total - plain) <= 3 * 4 * 512 * 1536
