"""Traces a model's calls with jaxtyping's annotations checked: `python -m tests.annotated_calls`.

It is a process of its own, since the hook works only for modules that are imported after it. Nearly
nothing is compiled: shapes and dtypes are known while tracing.
"""

import tempfile
from typing import Any

import jax
from jaxtyping import TypeCheckError, install_import_hook

import tests.annotation_check  # noqa: F401 (jaxtyping looks it up by name)

install_import_hook("tptt_jax", "tests.annotation_check.check_annotations")

import numpy as np  # noqa: E402 (the hook comes first)
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from tests.shapes import LLAMA, STREAMS  # noqa: E402
from tptt_jax import (  # noqa: E402
    CausalLM,
    LizaConfig,
    LoraConfig,
    ModelConfig,
    generate,
    init_cache,
    load_state,
    read,
    save_state,
)
from tptt_jax.inference.score import token_losses  # noqa: E402
from tptt_jax.ops.documents import tokens_so_far  # noqa: E402
from tptt_jax.training.fit import make_fit_step  # noqa: E402
from tptt_jax.training.partition import split_trainable  # noqa: E402
from tptt_jax.training.train_step import (  # noqa: E402
    Batch,
    TrainState,
    init_train_state,
    make_train_step,
)

TOKENS = np.ones((2, 12), np.int32)
PACKED = np.repeat(np.int32([[1, 1, 2, 2, 2, 0]]), 2, axis=1).repeat(2, axis=0)


def trace_calls(config: ModelConfig, liza: LizaConfig | None) -> None:
    """Whole rows, a train step of packed rows, and a token with a cache."""
    model = CausalLM(config, liza, LoraConfig(rank=2), rngs=nnx.Rngs(0))
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = optax.adam(1e-3)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    batch = Batch(TOKENS, PACKED, np.ones(TOKENS.shape, bool))
    jax.eval_shape(make_train_step(partition, optimizer), state, partition.frozen, batch)
    graphdef, weights = nnx.split(model)

    def call(weights: nnx.State, tokens: Any, cache: Any) -> Any:
        return nnx.merge(graphdef, weights)(tokens, cache=cache)

    cache = jax.eval_shape(lambda: init_cache(model, 2, 12))
    output = jax.eval_shape(call, weights, TOKENS, None)
    assert output.logits.shape == (*TOKENS.shape, config.vocab_size)
    for count in (12, 1):
        cache = jax.eval_shape(call, weights, TOKENS[:, :count], cache).cache


def trace_fit() -> None:
    """A step of fitting the default memory."""
    model = CausalLM(LLAMA, LizaConfig(softmax_window=4, chunk_size=4), rngs=nnx.Rngs(0))
    partition, trainable, _ = split_trainable(model, "memory")
    optimizer = optax.adam(1e-3)
    state: TrainState = init_train_state(trainable, None, optimizer, jax.random.key(0))
    step = make_fit_step(partition, optimizer)
    jax.eval_shape(step, state, partition.frozen, TOKENS, PACKED, None)


def run_inference() -> None:
    """Compiled calls: a state read, saved, loaded and continued, and a text scored."""
    model = CausalLM(LLAMA, LizaConfig(softmax_window=4, chunk_size=4), rngs=nnx.Rngs(0))
    state = read(model, TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        save_state(f"{folder}/state", model, state)
        state = load_state(f"{folder}/state", model)
    assert generate(model, TOKENS[:, :1], 2, state=state).tokens.shape == (2, 2)
    assert sum(map(len, token_losses(model, [TOKENS[0]]))) == TOKENS.shape[1] - 1


def check_that_checks_are_on() -> None:
    """Fails unless a wrong number of axes is refused."""
    try:
        tokens_so_far(PACKED[0])
    except TypeCheckError:
        return
    raise AssertionError("annotations are not checked: the hook must come before the imports.")


def main() -> None:
    """Traces everything, and says what was traced."""
    check_that_checks_are_on()
    for name, (config, options) in STREAMS.items():
        liza = None if options is None else LizaConfig(writes="all", **{"chunk_size": 4} | options)
        trace_calls(config, liza)
        print(f"checked: {name}")
    trace_calls(LLAMA, LizaConfig(softmax_window=4, chunk_size=4))
    trace_fit()
    run_inference()
    print("checked: evicted writes, a step of fitting, inference")


if __name__ == "__main__":
    main()
