"""Fitting the memory to the base model's own attention: no language-model loss, no base weights.

Every layer's mixed output is fitted to the output of full softmax attention. The error is measured
after the output projection, relative to the layer's gap, which is the error of the window alone: 1
means that the memory has no effect, 0 that nothing is lost.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tptt_jax.array_typing import Array, Bool, Float, Int, SegmentIds, Tokens
from tptt_jax.layers.liza import LizaAttention
from tptt_jax.layers.parameters import MemoryParam
from tptt_jax.model import CausalLM
from tptt_jax.training.finite import keep_finite
from tptt_jax.training.partition import Partition, Trainable, dotted
from tptt_jax.training.schedules import learning_rate_schedule
from tptt_jax.training.train_step import TrainState
from tptt_jax.training.transfer import LayerView, visit_layers


class FitMetrics(NamedTuple):
    """Metrics of a step, measured before its update.

    Attributes:
      gap_left: error over gap of every layer with a memory, in order [M], float32.
      is_finite: whether they, the gradient and what the step made of the state are finite; if
        not, the state stays as it was before the step.
    """

    gap_left: Float[Array, "M"]
    is_finite: Bool[Array, ""] | bool = True


FitStep = Callable[
    [TrainState, nnx.State, Tokens, SegmentIds | None, Array | None], tuple[TrainState, FitMetrics]
]


def make_fit_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a warm-up over a tenth of the steps, then a cosine to a twentieth.

    Args:
      learning_rate: peak rate.
      steps: of the whole fit.
    """
    warmup = min(max(steps // 10, 1), 100)
    rate = learning_rate_schedule("cosine", learning_rate, steps, warmup)
    # Gradients vary much between steps; a long average of their squares would adapt too slowly.
    return optax.adam(rate, b1=0.9, b2=0.95)


def make_fit_step(partition: Partition, optimizer: optax.GradientTransformation) -> FitStep:
    """Compiles ``(state, frozen, tokens, segment_ids, window) -> (state, metrics)``.

    The state is donated. `window` is below the model's own, or None.

    Args:
      partition: of the memory's parameters, from `split_trainable`.
      optimizer: over dicts of parameters.
    """

    def step(
        state: TrainState,
        frozen: nnx.State,
        tokens: Tokens,
        segment_ids: SegmentIds | None,
        window: Array | None,
    ) -> tuple[TrainState, FitMetrics]:
        model = partition.merge(state.trainable, None, frozen)
        gap_left, gradient = gap_gradients(model, tokens, segment_ids, window)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        old = (state.trainable, state.opt_state, state.step)
        new = (trainable, opt_state, state.step + 1)
        kept, is_finite = keep_finite(old, new, gap_left, optax.tree.norm(gradient))
        state = state._replace(trainable=kept[0], opt_state=kept[1], step=kept[2])
        return state, FitMetrics(gap_left, is_finite)

    return jax.jit(step, donate_argnums=0)


def gap_gradients(
    model: CausalLM,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    window: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "M"], Trainable]:
    """The remaining gap of each layer, and the gradient for its own memory.

    Args:
      model: a Titan whose memory runs.
      tokens: [B, T], longer than the window.
      segment_ids: packed documents, 0 = padding; None: one document per row.
      window: below the model's own, as a traced scalar; None: the model's own.

    Returns:
      Error over gap of the layers with a memory [M]; gradients of each by dotted path.
    """

    def visit(attention: LizaAttention, view: LayerView) -> tuple[Array, nnx.State]:
        graphdef, of_memory, others = nnx.split(attention, MemoryParam, ...)

        def loss(of_memory: nnx.State) -> Array:
            return gap_left(nnx.merge(graphdef, of_memory, others), view)

        return jax.value_and_grad(loss)(of_memory)

    left, gradients = [], {}
    for number, seen in enumerate(visit_layers(model, tokens, segment_ids, visit, window=window)):
        if seen is None:
            continue
        left.append(seen[0])
        for path, variable in nnx.to_flat_state(seen[1]):
            name = dotted(("stacks", number, "self_attn", *path))
            gradients[name] = variable.get_value()
    return jnp.concatenate(left), gradients


def gap_left(attention: LizaAttention, view: LayerView) -> Float[Array, ""]:
    """Squared error of a layer's projected output over that of its window alone."""
    linear, _ = attention.read_evicted(view.made, view.lost)
    mixed = attention.mix_evicted(view.made, view.windowed, linear, view.lost)
    errors = (mixed - view.full.out, view.windowed.out - view.full.out)
    mine, gap = (_projected_square(attention, error) for error in errors)
    return mine / jnp.maximum(jax.lax.stop_gradient(gap), 1e-12)


def _projected_square(attention: LizaAttention, x: Float[Array, "B T H D"]) -> Float[Array, ""]:
    projected = attention.project_out(x, use_bias=False).astype(jnp.float32)
    return jnp.sum(projected * projected)
