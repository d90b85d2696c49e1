"""The kernels of the forward pass: systems of equations, states, outputs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tptt_jax.array_typing import Array, Float
from tptt_jax.ops.delta_product.kernels.calls import (
    COLUMNS,
    KernelInputs,
    Layout,
    Operand,
    Refs,
    columns_of,
    read_wide,
    run_kernel,
)
from tptt_jax.ops.delta_product.kernels.factors import Factors, make_factors
from tptt_jax.ops.delta_product.kernels.tiles import (
    Cut,
    cross,
    decay_between,
    invert_unit_lower_tile,
    scale,
)


class Systems(NamedTuple):
    """Solutions of the chunks' systems, independent of the state.

    Attributes:
      reads: W [B, K, V, D] of R = U - W S.
      values: U [B, K, V, Dv].
      inverse: (I + L)^-1 [B, K, V, M] of every chunk.
    """

    reads: Float[Array, "B K V D"]
    values: Float[Array, "B K V Dv"]
    inverse: Float[Array, "B K V M"] | None


class States(NamedTuple):
    """The states between chunks, and R.

    Attributes:
      before: states before the chunks [B, K, n, D, Dv], rounded for products.
      solution: R [B, K, V, Dv], the values written along the keys.
      last: the state after the last chunk [B, K, D, Dv], float32.
    """

    before: Float[Array, "B K n D Dv"]
    solution: Float[Array, "B K V Dv"]
    last: Float[Array, "B K D Dv"]


def run_forward(inputs: KernelInputs, cut: Cut) -> tuple[Float[Array, "B T H Dv"], Array]:
    """The outputs in q's dtype, and the last state."""
    factors = make_factors(inputs.log_decay, inputs.ordinals, inputs.k.shape[2], cut)
    states = run_states(inputs, factors, solve_systems(inputs, factors, cut), cut)
    return _read_outputs(inputs, factors, states, cut), states.last


def solve_systems(
    inputs: KernelInputs, factors: Factors, cut: Cut, *, keep_inverse: bool = False
) -> Systems:
    """W = (I + L)^-1 (beta K exp(G)) and U = (I + L)^-1 (beta V), see `chunk_delta_product`."""
    layout = Layout(cut, inputs)
    inverse = layout.new_intermediate(cut.writes) if keep_inverse else None
    made = run_kernel(
        "systems",
        functools.partial(_solve, cut),
        layout,
        {
            **write_operands(inputs, factors, layout),
            "v": layout.writes(inputs.v),
            "into": layout.numbers(factors.into_writes, cut.writes),
        },
        {
            "reads": layout.intermediate(layout.new_intermediate(inputs.k.shape[-1])),
            "values": layout.intermediate(layout.new_intermediate(inputs.v.shape[-1])),
            "inverse": layout.intermediate(inverse),
        },
        # Tiles of 128 channels do not fit into the registers of two warps.
        warps=2 if max(inputs.k.shape[-1], inputs.v.shape[-1]) <= COLUMNS else 4,
    )
    return Systems(made.reads, made.values, made.inverse)


def run_states(inputs: KernelInputs, factors: Factors, systems: Systems, cut: Cut) -> States:
    """R = U - W S, S <- exp(G_C) S + (K exp(G_C - G))^T R from chunk to chunk."""
    layout = Layout(cut, inputs, whole=True)
    made = run_kernel(
        "states",
        functools.partial(_run_states, cut, layout.chunks),
        layout,
        {
            "reads": layout.intermediate(systems.reads),
            "values": layout.intermediate(systems.values, split=True),
            "k": layout.writes(inputs.k),
            "out": layout.numbers(factors.out_of_writes, cut.writes),
            "through": layout.numbers(factors.through, 1),
            "first": layout.state(inputs.state),
        },
        {
            "before": layout.states(layout.new_states()),
            "solution": layout.intermediate(
                layout.new_intermediate(inputs.v.shape[-1]), split=True
            ),
            "last": layout.state(inputs.state),
        },
        # Three chunks of float32 numbers do not fit into shared memory.
        stages=3 if cut.products.dtype == jnp.bfloat16 else 2,
    )
    return States(made.before, made.solution, made.last)


def _read_outputs(
    inputs: KernelInputs, factors: Factors, states: States, cut: Cut
) -> Float[Array, "B T H Dv"]:
    """O = (Q exp(G)) S + mask(Q K^T exp(G_i - G_j)) R."""
    layout = Layout(cut, inputs)
    width = inputs.v.shape[-1]
    out = jax.ShapeDtypeStruct((*inputs.q.shape[:3], width), inputs.q.dtype)
    made = run_kernel(
        "outputs",
        functools.partial(_read, cut, layout.group),
        layout,
        {
            **read_operands(inputs, factors, layout),
            "states": layout.states(states.before),
            "solution": layout.intermediate(states.solution),
        },
        {"out": layout.reads(out)},
    )
    return made.out


def write_operands(inputs: KernelInputs, factors: Factors, layout: Layout) -> dict[str, Operand]:
    """Operands of kernels that need L, of one chunk each."""
    writes = layout.cut.writes
    return {
        "k": layout.writes(inputs.k),
        "beta": layout.beta(inputs.beta),
        "decay": layout.numbers(factors.decay, writes),
        "until": layout.numbers(factors.until_writes, writes),
        "documents": layout.documents(factors.documents, writes),
    }


def read_operands(inputs: KernelInputs, factors: Factors, layout: Layout) -> dict[str, Operand]:
    """Operands of kernels that read, of one chunk each."""
    tokens, writes = layout.cut.tokens, layout.cut.writes
    return {
        "q": layout.reads(inputs.q),
        "k": layout.writes(inputs.k),
        "into": layout.numbers(factors.into_reads, tokens),
        "decay": layout.numbers(factors.decay, writes),
        "until": layout.numbers(factors.until_writes, writes),
        "read_until": layout.numbers(factors.until_reads, tokens),
        "documents": layout.documents(factors.documents, writes),
        "read_documents": layout.documents(factors.read_documents, tokens),
    }


def decay_below(
    cut: Cut,
    x: Refs,
    rows: slice = slice(None),
    columns: slice = slice(None),
    *,
    transposed: bool = False,
) -> Array:
    """Factor from virtual token j's write to token i, a part of [M, M]; 0 unless j is before i."""
    indices = cut.written(rows), cut.written(columns)
    row, column = cross(*indices, transposed)
    factor = (row > column).astype(jnp.float32)
    if x.decay is not None:
        until = (x.until[rows], x.until[columns])
        factor *= decay_between(cut.products, x.decay[...], *indices, until, transposed=transposed)
    if x.documents is not None:
        factor *= _same(x.documents[rows], x.documents[columns], transposed)
    return factor


def decay_visible(cut: Cut, x: Refs, *, transposed: bool = False) -> Array:
    """Factor from virtual token j's write to token t of its chunk [C, M]; 0 if j is later."""
    indices = cut.read(), cut.written()
    row, column = cross(*indices, transposed)
    factor = (row >= column).astype(jnp.float32)
    if x.decay is not None:
        until = (x.read_until[...], x.until[...])
        factor *= decay_between(cut.products, x.decay[...], *indices, until, transposed=transposed)
    if x.documents is not None:
        factor *= _same(x.read_documents[...], x.documents[...], transposed)
    return factor


def scale_by(x: Any, ref: Any, *where: Any) -> Array:
    """Scales by the factors of a reference that may be absent."""
    return x if ref is None else scale(x, ref[where] if where else ref[...])


def _same(rows: Array, columns: Array, transposed: bool) -> Array:
    row, column = cross(rows, columns, transposed)
    return (row == column).astype(jnp.float32)


def _solve(cut: Cut, x: Refs, y: Refs) -> None:
    parts = [slice(i, i + cut.part) for i in range(0, cut.writes, cut.part)]
    inverse: dict[tuple[int, int], Array] = {}
    for i, rows in enumerate(parts):
        inverse[i, i] = invert_unit_lower_tile(cut.products, _lower(cut, x, rows, rows))
        for j in range(i):
            # Row i of L left of the diagonal, times the inverse above it.
            left = [_lower(cut, x, rows, parts[m]) for m in range(j, i)]
            corner = sum(
                cut.products.exact_dot(lower, inverse[m, j])
                for m, lower in zip(range(j, i), left, strict=True)
            )
            inverse[i, j] = -cut.products.exact_dot(inverse[i, i], jnp.asarray(corner))
    for i, rows in enumerate(parts):
        tiles = [(parts[j], inverse[i, j]) for j in range(i + 1)]
        _write_solution(cut, x, x.k, x.into, tiles, y.reads, rows)
        _write_solution(cut, x, x.v, None, tiles, y.values, rows)
    if y.inverse is not None:
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts):
                tile = inverse.get((i, j), jnp.zeros((cut.part, cut.part), jnp.float32))
                y.inverse[rows, columns] = tile.astype(y.inverse.dtype)


def _lower(cut: Cut, x: Refs, rows: slice, columns: slice) -> Array:
    """A part of L."""
    beta = read_wide(x.beta, rows)
    if beta.ndim == 1:
        # Half-precision keys are multiplied unchanged, which avoids rounding beta k.
        product = scale(cut.products.dot(x.k[rows], x.k[columns], "nt"), beta)
    else:
        product = cut.products.dot(scale(read_wide(x.k, rows), beta), x.k[columns], "nt")
    return product * decay_below(cut, x, rows, columns)


def _write_solution(
    cut: Cut,
    x: Refs,
    source: Any,
    into: Any,
    inverse: list[tuple[slice, Array]],
    target: Any,
    rows: slice,
) -> None:
    """Rows of (I + L)^-1 (beta source), given these rows of the inverse by columns."""
    for channels in columns_of(source):
        total = 0.0
        for columns, tile in inverse:
            beta = x.beta[columns] if len(x.beta.shape) == 1 else x.beta[columns, channels]
            gated = scale(read_wide(source, columns, channels), beta.astype(jnp.float32))
            total += cut.products.dot(tile, scale_by(gated, into, columns))
        target[rows, channels] = jnp.asarray(total).astype(target.dtype)


def _run_states(cut: Cut, count: int, x: Refs, y: Refs) -> None:
    dot, dtype = cut.products.dot, cut.products.dtype

    def run_chunk(c: Array, state: Array) -> Array:
        here = pl.ds(c * cut.writes, cut.writes)
        y.before[c] = state.astype(dtype)
        solution = read_wide(x.values, here) - dot(x.reads[here], state)
        y.solution[here] = solution.astype(dtype)
        key_out = scale_by(read_wide(x.k, here), x.out, here)
        state = state if x.through is None else state * x.through[c]
        return state + dot(key_out, solution, "tn")

    y.last[...] = jax.lax.fori_loop(0, count, run_chunk, x.first[...])


def _read(cut: Cut, group: int, x: Refs, y: Refs) -> None:
    dot = cut.products.dot
    k, visible = x.k[...], decay_visible(cut, x)
    for g in range(group):
        q = x.q[:, g]
        query_in = scale_by(q.astype(jnp.float32), x.into)
        scores = dot(q, k, "nt") * visible
        out = dot(query_in, x.states[...]) + dot(scores, x.solution[...])
        y.out[:, g] = out.astype(y.out.dtype)
