"""Guards against slower programs without a clock: XLA's counts, within a band.

Counted is what is compiled, with a loop's body once. A change for the better moves the numbers
too: then write the new ones down.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.ops import chunk_delta_product
from tptt_jax.ops.delta_product.plan import OTHERS, SIZES
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

FLOPS_BAND, BYTES_BAND = 1.2, 1.4


def compile_operator(length: int, *, grad: bool = False):
    shapes = [(1, length, 4, 64), *[(1, length, 2, 2, 64)] * 2, (1, length, 2, 2)]

    def forward(*inputs):
        return chunk_delta_product(*inputs)[0]

    function = jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2, 3)) if grad else forward
    return (
        jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    )


def compile_step(liza: LizaConfig | None):
    config = ModelConfig.tiny(
        num_layers=4, embed_dim=256, mlp_dim=1024, vocab_size=2048, head_dim=64
    )
    model = CausalLM(config, liza, LoraConfig(dropout=0.0), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = make_optimizer(OptimizerConfig(), 100, partition)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    rows = jnp.ones((2, 256), jnp.int32)
    batch = Batch(rows, rows, rows > 0)
    return make_train_step(partition, optimizer).lower(state, partition.frozen, batch).compile()


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


counted = pytest.mark.skipif(
    not jax.__version__.startswith("0.10."), reason="counts are those of the compiler of jax 0.10"
)


def assert_costs(compiled, flops: float, num_bytes: float) -> None:
    costs = compiled.cost_analysis()
    got = costs["flops"], costs["bytes accessed"]
    assert flops / FLOPS_BAND < got[0] < flops * FLOPS_BAND, got
    assert num_bytes / BYTES_BAND < got[1] < num_bytes * BYTES_BAND, got


@counted
@pytest.mark.parametrize(
    ("plan", "grad", "flops", "num_bytes"),
    [
        ("cpu", False, 6.69e6, 5.41e6),
        ("cpu", True, 4.59e7, 2.44e7),
        ("accelerator", False, 1.98e8, 6.67e7),
        ("accelerator", True, 8.11e8, 1.66e8),
    ],
)
def test_operator_costs_what_it_did(plan, grad, flops, num_bytes, monkeypatch):
    if plan == "accelerator":
        monkeypatch.setitem(SIZES, "cpu", OTHERS)
    assert_costs(compile_operator(1024, grad=grad), flops, num_bytes)


@pytest.mark.parametrize(
    ("liza", "flops", "num_bytes", "kept"),
    [(None, 2.72e9, 2.74e8, 4.47e7), (LizaConfig(writes="all"), 2.92e9, 3.91e8, 5.36e7)],
    ids=["base", "titan"],
)
def test_training_step_costs_what_it_did(liza, flops, num_bytes, kept):
    compiled = compile_step(liza)
    assert_costs(compiled, flops, num_bytes)
    # What layers keep for the gradient is most of it.
    assert temporaries(compiled) < 1.1 * kept


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("plan", ["cpu", "accelerator"])
def test_memory_of_the_operator_is_linear_in_the_length(plan, grad, monkeypatch):
    if plan == "accelerator":
        monkeypatch.setitem(SIZES, "cpu", OTHERS)

    short, long = (temporaries(compile_operator(length, grad=grad)) for length in (4096, 8192))
    assert long < 2.05 * short
