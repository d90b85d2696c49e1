"""A loss and its gradients as a compiled program, whose exchanges between devices are counted."""

import re
from typing import Any

import jax
import numpy as np
from flax import nnx

from tests.contracts import random_tokens
from tptt_jax import CausalLM
from tptt_jax.training.loss import causal_lm_loss

TOKENS, VOCAB_SIZE = 22, 96


def packed_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eight rows: tokens, documents, and which tokens count."""
    tokens = random_tokens((8, TOKENS), vocab_size=VOCAB_SIZE)
    ids = np.repeat([[1, 2, 0]], [9, 10, 3], axis=1).astype(np.int32) + 0 * tokens
    return tokens, ids, tokens % 5 != 0


def loss_and_gradients(model: CausalLM, batch: Any) -> tuple[Any, dict[str, jax.Array], str]:
    """The loss, gradients of all parameters by path, and the compiled program."""
    graphdef, parameters = nnx.split(model)

    @jax.jit
    def run(parameters: Any, batch: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            total, count = causal_lm_loss(nnx.merge(graphdef, parameters), *batch, train_head=True)
            return total / count

        return jax.value_and_grad(loss)(parameters)

    program = run.lower(parameters, batch).compile()
    loss, gradients = program(parameters, batch)
    flat = {".".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(gradients)}
    return loss, flat, program.as_text() or ""


def gathered_shapes(program: str) -> list[list[int]]:
    """Shapes of the float32 arrays that all-gathers of a compiled program make."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    return [[int(size) for size in shape.split(",")] for shape in shapes]
