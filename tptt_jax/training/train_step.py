"""One compiled optimizer step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from tptt_jax.array_typing import Array, Bool, Float, Int, Key, SegmentIds, Tokens
from tptt_jax.config import Remat
from tptt_jax.layers.parameters import AdapterParam, BaseParam, MemoryParam
from tptt_jax.model import CausalLM, base_model, replace_memory
from tptt_jax.processes import put
from tptt_jax.sharding import replicated
from tptt_jax.training.finite import keep_finite
from tptt_jax.training.loss import causal_lm_loss, distillation_loss
from tptt_jax.training.partition import Partition, Trainable
from tptt_jax.training.schedules import MagSchedule


class Batch(NamedTuple):
    """One batch of rows.

    Attributes:
      tokens: [B, T].
      segment_ids: [B, T], 0 = padding.
      loss_mask: True on tokens whose prediction counts, or its weight [B, T].
    """

    tokens: Tokens
    segment_ids: SegmentIds
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"]


class TrainState(NamedTuple):
    """All state that changes from step to step: the content of a checkpoint.

    Attributes:
      trainable: parameters by dotted path, float32.
      opt_state: optax state over them.
      share: the scheduled share mu, or None.
      step: optimizer steps done, int32.
      key: randomness of dropout; every step folds its number in.
    """

    trainable: Trainable
    opt_state: optax.OptState
    share: Float[Array, ""] | None
    step: Int[Array, ""]
    key: Key[Array, ""]


class StepMetrics(NamedTuple):
    """float32 scalars of one step.

    Attributes:
      loss: mean nats per counted token.
      tokens: number of counted tokens.
      grad_norm: global norm before clipping.
      mu_mean: mean share of the memory; NaN if shares differ by query, see `share_range`.
      mu_min: smallest share of any head.
      mu_max: largest share of any head.
      is_finite: whether loss, gradient and what the step made of the state are finite; if not,
        the state stays as it was before the step.
    """

    loss: Array
    tokens: Array
    grad_norm: Array
    mu_mean: Array
    mu_min: Array
    mu_max: Array
    is_finite: Bool[Array, ""] | bool = True


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]
"""(state, frozen, batch, window=None, asked=None) -> (state, metrics)."""


def init_train_state(
    trainable: Trainable,
    share: Array | None,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
) -> TrainState:
    """The state before the first step; the optimizer's arrays have the parameters' shardings."""
    # The step donates its state; copies keep the caller's model, its share and the key alive.
    trainable, share, key = jax.tree.map(jnp.copy, (trainable, share, key))
    opt_state = optimizer.init(trainable)
    return TrainState(trainable, opt_state, share, jnp.zeros((), jnp.int32), key)


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Replicates arrays that are not on the mesh yet (counters, keys, shares)."""

    def place(x: Array) -> Array:
        on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if on_mesh else put(x, replicated(mesh))

    return jax.tree.map(place, state)


def make_train_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    *,
    mag_schedule: MagSchedule | None = None,
    remat: Remat = "none",
    dropout: bool = True,
    distill: float = 0.0,
    accumulate: int = 1,
    asked_parts: int = 0,
) -> TrainStep:
    """Compiles a step; the state is donated.

    It is called as ``(state, frozen, batch, window=None, asked=None) -> (state, metrics)``.

    A step whose loss, gradient or result is not finite leaves the state as it was
    (`StepMetrics.is_finite`).

    `window` is a softmax window below the model's own, as a scalar, so that each step may draw
    another. Only the trainable side is differentiated. A scheduled share is computed inside,
    from the step, so that changing it never recompiles.

    `asked` is a batch whose gradient reaches the memory's parameters alone: rows that teach it to
    recall, which would cost the rest of the model a part of what it learns from text.

    Args:
      partition: from `split_trainable`.
      optimizer: over dicts of parameters.
      mag_schedule: for models with a scheduled share; None keeps the share.
      remat: what the backward pass recomputes.
      dropout: whether adapters drop inputs.
      distill: share of the loss that is the divergence from the base model's own predictions;
        adapters count as part of it unless they are trained.
      accumulate: parts that the rows of a batch are worked through in, one after the other; the
        step is that of the whole batch, and needs the activations of one part. Part i has the rows
        i, i + accumulate, i + 2 * accumulate, ..., so that each device keeps its own rows.
      asked_parts: parts that the rows of `asked` are worked through in, each with as many rows as
        one of `batch`; 0: the step takes no such rows. Rows of another length than those of
        `batch` take longer to compile.

    Raises:
      ValueError: if the model is to be distilled from weights that are trained themselves, if
        `asked` rows have no memory to train, or (in the step) if the rows of a batch do not divide
        into parts.
    """
    if distill and partition.names(BaseParam):
        raise ValueError(
            "distillation needs unchanged weights of the base model: train adapters or the memory "
            "instead."
        )
    if asked_parts and not partition.names(MemoryParam):
        raise ValueError(
            "rows for the memory alone need a memory that is trained, and this model has none: "
            "give it one, or leave such rows out."
        )
    parts = accumulate + asked_parts
    loss_of = _make_loss(partition, remat, distill, dropout=dropout, is_mean=parts == 1)
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def train_step(
        state: TrainState,
        frozen: nnx.State,
        batch: Batch,
        window: Array | None = None,
        asked: Batch | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        if (asked is None) != (asked_parts == 0):
            raise ValueError(
                "a step takes rows for the memory alone if, and only if, it has parts."
            )
        share = state.share
        if share is not None and mag_schedule is not None:
            share = mag_schedule(state.step)
        key = jax.random.fold_in(state.key, state.step)
        if parts == 1:
            (loss, count), gradient = value_and_grad(
                state.trainable, share, frozen, batch, window, key
            )
        else:
            (loss, count), gradient = _sum_parts(
                lambda part, key: value_and_grad(state.trainable, share, frozen, part, window, key),
                partition,
                state.trainable,
                _split_rows(batch, accumulate),
                None if asked is None else _split_rows(asked, asked_parts),
                key,
            )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = cast("Trainable", optax.apply_updates(state.trainable, updates))
        norm = optax.tree.norm(gradient)
        old = (state.trainable, state.opt_state, state.share, state.step)
        new = (trainable, opt_state, share, state.step + 1)
        kept, is_finite = keep_finite(old, new, loss, norm)
        shares = share_range(state.trainable, share)
        return TrainState(*kept, state.key), StepMetrics(loss, count, norm, *shares, is_finite)

    return jax.jit(train_step, donate_argnums=0)


def _make_loss(
    partition: Partition, remat: Remat, distill: float, *, dropout: bool, is_mean: bool
) -> Callable[..., tuple[Array, Array]]:
    """(trainable, share, frozen, batch, window, key) -> (mean or summed loss, counted tokens)."""
    train_adapters = bool(partition.names(AdapterParam))
    train_head = any(name in partition.template for name in ("embed.embedding", "lm_head.kernel"))

    def loss_of(
        trainable: Trainable,
        share: Array | None,
        frozen: nnx.State,
        batch: Batch,
        window: Array | None,
        key: Array,
    ) -> tuple[Array, Array]:
        model = partition.merge(trainable, share, frozen)
        options: Any = {"remat": remat, "window": window, "dropout_key": key if dropout else None}
        if distill:
            # Frozen adapters are part of the teacher.
            teacher = base_model(model) if train_adapters else replace_memory(model, None)
            # The teacher has no dropout in any mode of the student.
            teacher.eval()
            total, count = distillation_loss(model, teacher, *batch, share=distill, **options)
        else:
            total, count = causal_lm_loss(model, *batch, train_head=train_head, **options)
        return total / jnp.maximum(count, 1) if is_mean else total, count

    return loss_of


def _sum_parts(
    value_and_grad: Callable[[Batch, Array], Any],
    partition: Partition,
    trainable: Trainable,
    rows: Batch,
    asked: Batch | None,
    key: Array,
) -> tuple[tuple[Array, Array], Trainable]:
    """((mean loss, counted tokens), gradient of the mean loss) of a step in several parts.

    Args:
      value_and_grad: (part, key) -> ((summed loss, counted tokens), gradient of the sum).
      partition: of the parameters.
      trainable: what it differentiates.
      rows: parts of the batch [parts, B, T].
      asked: parts whose gradient reaches the memory alone.
      key: of dropout; every part folds its number in.
    """
    first_asked, of_memory = len(rows.tokens), partition.names(MemoryParam)
    groups = [rows]
    if asked is not None:
        groups.append(asked)
        if rows.tokens.shape[1:] == asked.tokens.shape[1:]:
            # Parts of one shape are compiled once.
            groups = [Batch(*(jnp.concatenate(both) for both in zip(*groups, strict=True)))]

    def add(sums: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
        number, part = numbered
        values, gradient = value_and_grad(part, jax.random.fold_in(key, number))
        if asked is not None:
            is_asked = number >= first_asked
            gradient = {
                name: value if name in of_memory else jnp.where(is_asked, 0, value)
                for name, value in gradient.items()
            }
        return jax.tree.map(jnp.add, sums, (values, gradient)), None

    sums = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, trainable))
    first = 0
    for group in groups:
        numbered = (first + jnp.arange(len(group.tokens)), group)
        sums, _ = jax.lax.scan(add, sums, numbered)
        first += len(group.tokens)
    (total, count), gradient = sums
    counted = jnp.maximum(count, 1)
    return (total / counted, count), jax.tree.map(lambda x: x / counted, gradient)


def _split_rows(batch: Batch, parts: int) -> Batch:
    """[B, T] -> [parts, B / parts, T]; part i has the rows i, i + parts, ..."""
    rows = len(batch.tokens)
    if rows % parts:
        raise ValueError(
            f"{rows} rows cannot be worked through in {parts} equal parts: choose a multiple."
        )

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0)

    return Batch(*map(split, batch))


def share_range(trainable: Trainable, share: Array | None) -> tuple[Array, Array, Array]:
    """Mean, least and largest share of the memory over all heads.

    NaN without a memory, or if its share differs by query.
    """
    logits = [value.ravel() for name, value in trainable.items() if name.endswith(".mag.logit")]
    if logits:
        values = jax.nn.sigmoid(jnp.concatenate(logits))
    else:
        values = jnp.full((1,), jnp.nan) if share is None else jnp.reshape(share, (1,))
    return jnp.mean(values), jnp.min(values), jnp.max(values)


@functools.partial(nnx.jit, static_argnames="use_memory")
def eval_step(model: CausalLM, batch: Batch, *, use_memory: bool = True) -> tuple[Array, Array]:
    """(summed nats, counted tokens); compiled once for each kind of model and shape of batch."""
    return causal_lm_loss(model, *batch, use_memory=use_memory)
