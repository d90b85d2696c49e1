"""The start of a fit, in closed form: the mass gate by ridge regression, then read-out sizes."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax.array_typing import Array, Float, SegmentIds, Tokens
from tptt_jax.layers.gates import MassGate, ReadScale
from tptt_jax.layers.liza import LizaAttention
from tptt_jax.model import CausalLM
from tptt_jax.processes import fetch
from tptt_jax.training.partition import Partition, Trainable
from tptt_jax.training.transfer import LayerView, visit_layers

Rows = tuple[Tokens, SegmentIds | None]

# Relative to the mean diagonal of the normal equations.
_RIDGE = 1e-3
# Shares near 0 and 1 carry little information, but some.
_LEAST_WEIGHT = 1e-3
_LEAST_SCALE = 0.02


class _Sums(NamedTuple):
    """Sums over the tokens of a layer [H, ...]; F features."""

    products: Array  # [H, F, F]
    targets: Array  # [H, F]
    most: Array  # [H]: most tokens that the memory held

    def plus(self, other: "_Sums") -> "_Sums":
        """The sums over the tokens of both."""
        sums = jax.tree.map(np.add, self, other)
        return sums._replace(most=jax.tree.map(np.maximum, self.most, other.most))


def fit_gates(
    partition: Partition, trainable: Trainable, frozen: nnx.State, rows: Iterable[Rows]
) -> Trainable:
    """Fits the mass gate and the scale of the read-out.

    log Z_out of the base model's own attention is regressed on [q, log n, 1], with weights
    share (1 - share), where the share is most sensitive to it; then each head's read-out is scaled
    so that the mixed output is nearest to full attention.

    Args:
      partition: of the memory's parameters, from `split_trainable`.
      trainable: their values.
      frozen: the rest of the model.
      rows: a few batches of tokens and segment ids, longer than the window.

    Raises:
      ValueError: if no token of the rows leaves the window.
    """
    rows = list(rows)
    for has, sums_of, solve in (
        (_has(MassGate), _gate_sums, _solve_gate),
        (_has(ReadScale), _scale_sums, _solve_scale),
    ):
        if has(partition.merge(trainable, None, frozen)):
            collect = _collector(partition, frozen, sums_of)
            found = [
                jax.tree.map(
                    lambda x: fetch(x).astype(np.float64), collect(trainable, tokens, segment_ids)
                )
                for tokens, segment_ids in rows
            ]
            totals = [
                None if stack[0] is None else functools.reduce(_Sums.plus, stack)
                for stack in zip(*found, strict=True)
            ]
            if not any(leaf.any() for leaf in jax.tree.leaves(totals)):
                raise ValueError(
                    "no token leaves the window in the rows that the memory is fitted on: fit it "
                    "to texts that are longer than softmax_window + softmax_sinks."
                )
            trainable = trainable | solve(totals)
    return trainable


def _has(kind: type) -> Callable[[CausalLM], bool]:
    return lambda model: any(isinstance(module, kind) for _, module in nnx.iter_modules(model))


def _collector(
    partition: Partition, frozen: nnx.State, sums_of: Callable[[LizaAttention, LayerView], _Sums]
) -> Callable[[Trainable, Array, Array | None], list[Any]]:
    @jax.jit
    def collect(
        trainable: Trainable, frozen: nnx.State, tokens: Array, segment_ids: Array | None
    ) -> list[Any]:
        model = partition.merge(trainable, None, frozen)
        return visit_layers(model, tokens, segment_ids, sums_of)

    return lambda trainable, tokens, ids: collect(trainable, frozen, tokens, ids)


def _gate_sums(_: LizaAttention, view: LayerView) -> _Sums:
    held = view.lost.held[..., None]
    log_all, log_in = view.full.log_mass, view.windowed.log_mass
    assert log_all is not None
    assert log_in is not None
    share = -jnp.expm1(jnp.minimum(log_in - log_all, -1e-6))
    log_out = log_all + jnp.log(share)
    weight = jnp.where(held > 0, share * (1 - share) + _LEAST_WEIGHT, 0)  # [B, T, H]
    q = view.made.soft_q.astype(jnp.float32)
    log_n = jnp.log(jnp.maximum(held, 1).astype(jnp.float32))[..., None]
    ones = jnp.ones((*q.shape[:3], 1))
    features = jnp.concatenate([q, log_n * ones, ones], axis=-1)
    products, sums = _weighted_sums(features, weight, log_out)
    return _Sums(products, sums, jnp.full(q.shape[2], jnp.max(held)))


def _weighted_sums(features: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
    """[B, T, H, F], [B, T, H], [B, T, H]."""
    by_head = jnp.moveaxis(features, 2, 0).reshape(features.shape[2], -1, features.shape[-1])
    weight, targets = (jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, 1) for x in (weight, targets))
    weighted = jnp.swapaxes(by_head * weight, 1, 2)
    products = jnp.matmul(weighted, by_head, precision="highest")
    return products, jnp.matmul(weighted, targets, precision="highest")[..., 0]


def _solve_gate(totals: list[_Sums | None]) -> Trainable:
    solved: Trainable = {}
    for number, sums in enumerate(totals):
        if sums is None:
            continue
        size = sums.products.shape[-1]
        diagonal = np.trace(sums.products, axis1=-2, axis2=-1)[..., None, None] / size
        ridge = (_RIDGE * diagonal + 1e-12) * np.eye(size)
        found = np.linalg.solve(sums.products + ridge, sums.targets[..., None])[..., 0]
        path = f"stacks.{number}.self_attn.mag"
        parts = {"weight": found[..., :-2], "slope": found[..., -2], "bias": found[..., -1]}
        parts["limit"] = np.log(sums.most)
        solved |= {f"{path}.{name}": _float32(value) for name, value in parts.items()}
    return solved


def _scale_sums(attention: LizaAttention, view: LayerView) -> _Sums:
    """Sums for the regression of one factor on a head's read-out."""
    linear, _ = attention.read_evicted(view.made, view.lost)
    shape = linear.shape
    # The mixture is linear in the read-out: its part, and the residual without it.
    without = attention.mix_evicted(
        view.made, view.windowed, jnp.zeros(shape, linear.dtype), view.lost
    )
    part = attention.mix_evicted(view.made, view.windowed, linear, view.lost) - without
    missing = view.full.out - without
    part, missing = (x.astype(jnp.float32) for x in (part, missing))
    products = jnp.sum(part * part, axis=(0, 1, 3))
    most = jnp.full(shape[2], jnp.max(view.lost.held))
    return _Sums(products, jnp.sum(part * missing, axis=(0, 1, 3)), most)


def _solve_scale(totals: list[_Sums | None]) -> Trainable:
    solved: Trainable = {}
    for number, sums in enumerate(totals):
        if sums is not None:
            factor = sums.targets / np.maximum(sums.products, 1e-12)
            name = f"stacks.{number}.self_attn.memory.scale.bias"
            solved[name] = _float32(np.log(np.maximum(factor, _LEAST_SCALE)))
    return solved


def _float32(x: np.ndarray) -> Float[Array, "..."]:
    return jnp.asarray(x, jnp.float32)
