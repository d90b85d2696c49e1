"""Counted arithmetic against XLA's own count of the programs, parameters and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import flops
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import AttentionConfig, ExpertsConfig, LayerSizes, MlpConfig
from tptt_jax.ops import chunk_delta_product, step_delta_product
from tptt_jax.ops.delta_product.plan import OTHERS, SIZES
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

B, T, H, K, D = 2, 64, 4, 2, 64


@pytest.fixture(autouse=True)
def one_chunk(monkeypatch):
    """A row is one chunk, as on an accelerator; of several, XLA would count one."""
    monkeypatch.setitem(SIZES, "cpu", OTHERS)


CONFIG = ModelConfig.tiny(num_layers=1, embed_dim=256, mlp_dim=1024, vocab_size=2048, head_dim=64)


def counted_by_xla(function, *arguments) -> float:
    """Of the program before it is compiled. XLA counts a loop's body once: one chunk, one layer."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def assert_within(xla: float, ours: float, most: float) -> None:
    """XLA counts element-wise work as well, and what is masked away: somewhat more, never less."""
    assert 1 <= xla / ours <= most, xla / ours


def operands(householder: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    virtual = (B, T, householder, K)
    shapes = ((B, T, H, D), (*virtual, D), (*virtual, D), virtual)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


@pytest.mark.parametrize("householder", [1, 2])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
def test_operator(householder, grad):
    def forward(*inputs):
        return chunk_delta_product(*inputs)[0]

    function = jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2, 3)) if grad else forward
    ours = flops.operator_flops(
        tokens=B * T, heads=H, kv_heads=K, head_dim=D, householder=householder
    )
    xla = counted_by_xla(function, *operands(householder))
    # Gradients make the forward pass again, block by block.
    assert_within(xla, 3 * ours if grad else ours, 1.4 if grad else 1.15)


def test_step():
    q, k, v, beta = (x.update(shape=(B, *x.shape[2:])) for x in operands(2))
    state = jax.ShapeDtypeStruct((B, K, D, D), jnp.float32)
    xla = counted_by_xla(step_delta_product, q, k, v, beta, state)
    ours = B * flops.step_flops(heads=H, kv_heads=K, head_dim=D, householder=2)
    assert_within(xla, ours, 1.1)


MEMORIES = {
    "base": None,
    "evicted": LizaConfig(softmax_window=16, memory_rank=64),
    "idle": LizaConfig(),
    "window alone": LizaConfig(writes="none", softmax_window=16),
    "every token": LizaConfig(writes="all"),
    "one step": LizaConfig(writes="all", operator="delta_rule"),
    "every token, window": LizaConfig(writes="all", softmax_window=16),
    "no softmax": LizaConfig(writes="all", softmax=False),
    "own deltas": LizaConfig(writes="all", memory_rank=64),
    "cross gate": LizaConfig(writes="all", cross_gate=True),
}


@pytest.mark.parametrize("liza", MEMORIES.values(), ids=MEMORIES)
def test_forward_pass(liza):
    lora = LoraConfig(rank=64, dropout=0.0)
    model = nnx.eval_shape(lambda: CausalLM(CONFIG, liza, lora, rngs=nnx.Rngs(0)))
    graphdef, weights = nnx.split(model)
    xla = counted_by_xla(
        lambda weights, tokens: nnx.merge(graphdef, weights)(tokens).logits,
        weights,
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    per_token = flops.weights_flops(CONFIG, liza) + flops.head_flops(CONFIG)
    per_token += flops.adapter_flops(CONFIG, liza, lora)
    per_row = flops.attention_flops(CONFIG, liza, T) + flops.row_memory_flops(CONFIG, liza, T)
    assert_within(xla, B * (T * per_token + per_row), 1.08)


TRAINED = [(None, "lora"), (None, "projections"), (None, "full")]
TRAINED += [(LizaConfig(softmax_window=16), mode) for mode in ("lora", "full", "memory")]
TRAINED += [(LizaConfig(writes="all"), mode) for mode in ("lora", "projections")]


@pytest.mark.parametrize(("liza", "mode"), TRAINED, ids=lambda x: getattr(x, "writes", str(x)))
def test_training_step(liza, mode):
    lora = LoraConfig(dropout=0.0) if mode == "lora" else None
    model = CausalLM(CONFIG, liza, lora, rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, mode)
    optimizer = make_optimizer(OptimizerConfig(), 100, partition)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    rows = jnp.ones((B, T), jnp.int32)
    xla = counted_by_xla(
        make_train_step(partition, optimizer),
        state,
        partition.frozen,
        Batch(rows, rows, rows > 0),
    )
    ours = flops.training_flops(CONFIG, liza, lora, batch=B, tokens=T, mode=mode)
    assert_within(xla, ours, 1.25)


SHAPES = {
    "smollm2": ModelConfig.smollm2_135m(),
    "gemma3": ModelConfig.gemma3_270m(),
    "llama3.2": ModelConfig.llama3_2_1b(),
    "no gate, one projection": ModelConfig.tiny(
        mlp=MlpConfig(gated=False), attention=AttentionConfig(fused_qkv=True)
    ),
    "layers differ": ModelConfig.tiny(
        num_layers=2, per_layer=LayerSizes(num_heads=(2, 4), num_kv_heads=(1, 2))
    ),
    "experts": ModelConfig.tiny(experts=ExpertsConfig(number=4, per_token=4)),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_weights_are_the_parameters_of_the_model(config):
    lora = LoraConfig(targets=("q_proj", "o_proj"))
    model = nnx.eval_shape(lambda: CausalLM(config, None, lora, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model.stacks))
    kernels = sum(x.get_value().size for path, x in flat if path[-1] == "kernel")
    adapters = sum(x.get_value().size for path, x in flat if path[-1] in ("a", "b"))
    assert flops.weights_flops(config, None) == 2 * kernels
    assert flops.adapter_flops(config, None, lora) == 2 * adapters
    assert flops.head_flops(config) == 2 * config.vocab_size * config.embed_dim


@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (5, 0), (5, 2), (5, 9), (100, 4)], ids=str
)
@pytest.mark.parametrize("first", [0, 3, 20])
def test_attention_counts_what_queries_see(window, sinks, first):
    tokens = 33
    liza = None
    if window is not None:
        liza = LizaConfig(softmax_window=window, softmax_sinks=sinks)
    query, key = np.arange(first, first + tokens)[:, None], np.arange(first + tokens)
    seen = key <= query
    if window is not None:
        seen &= (key > query - window) | (key < sinks)
    config = ModelConfig.tiny(num_layers=2)
    want = 2 * 4 * config.num_heads * config.head_dim * seen.sum()
    assert flops.attention_flops(config, liza, tokens, first=first) == want


def test_sliding_layers_keep_their_window():
    config = ModelConfig.tiny(layer_kinds=("sliding", "full", "full"), sliding_window=8)
    part = functools.partial(flops.attention_flops, tokens=200)
    one_full = part(ModelConfig.tiny(num_layers=1), None)
    assert part(config, None) < 2.2 * one_full
    assert part(config, LizaConfig(softmax_window=16)) < 0.5 * one_full
    kept = part(config, LizaConfig(softmax_window=16, full_layers=(2,)))
    assert one_full < kept < 1.5 * one_full


def test_decoding_adds_up():
    config, liza = ModelConfig.tiny(), LizaConfig(softmax_window=4)
    count = functools.partial(flops.decoding_flops, config, liza)
    whole = count(batch=3, prompt=6, tokens=10)
    assert whole == 3 * count(batch=1, prompt=6, tokens=10)
    # An idle memory costs nothing.
    idle = flops.decoding_flops(config, LizaConfig(), batch=1, prompt=6, tokens=10)
    assert idle == flops.decoding_flops(config, None, batch=1, prompt=6, tokens=10)
    # Without a memory a token decoded is a token read, but for its logits.
    read = flops.decoding_flops(config, None, batch=1, prompt=16, tokens=0)
    decoded = flops.decoding_flops(config, None, batch=1, prompt=6, tokens=10)
    assert decoded - read == 10 * flops.head_flops(config)
