"""The kernels of the forward pass: systems of equations, states, outputs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tptt_jax.array_typing import Array, Float
from tptt_jax.ops.kernels.calls import (
    KernelInputs,
    Layout,
    Refs,
    read_all,
    run_kernel,
)
from tptt_jax.ops.kernels.tiles import (
    Cut,
    decay_between,
    invert_unit_lower_tile,
    reaches,
    scale,
)


class Systems(NamedTuple):
    """What chunks know before they know the state.

    Attributes:
      reads: W [B, K, V, D], what R lacks of U for a state.
      values: U [B, K, V, Dv].
      inverse: (I + L)^-1 [B, K, V, M] of every chunk.
    """

    reads: Float[Array, "B K V D"]
    values: Float[Array, "B K V Dv"]
    inverse: Float[Array, "B K V M"] | None


class States(NamedTuple):
    """What went from chunk to chunk.

    Attributes:
      before: states before the chunks [B, K, n, D, Dv], rounded to be multiplied.
      solution: R [B, K, V, Dv], what is written along the keys.
      last: the state after the last chunk [B, K, D, Dv], float32.
    """

    before: Float[Array, "B K n D Dv"]
    solution: Float[Array, "B K V Dv"]
    last: Float[Array, "B K D Dv"]


def run_forward(inputs: KernelInputs, cut: Cut) -> tuple[Float[Array, "B T H Dv"], Array]:
    """The outputs in q's dtype, and the last state."""
    states = run_states(inputs, solve_systems(inputs, cut), cut)
    return read_outputs(inputs, states, cut), states.last


def solve_systems(inputs: KernelInputs, cut: Cut, *, keep_inverse: bool = False) -> Systems:
    """W = (I + L)^-1 (beta K exp(G)) and U = (I + L)^-1 (beta V), see `chunk_delta_product`."""
    layout, carries, ordinals = Layout(cut, inputs), inputs.carries, inputs.ordinals
    inverse = layout.new_made(cut.writes) if keep_inverse else None
    made = run_kernel(
        "systems",
        functools.partial(_solve, cut),
        layout,
        {
            "k": layout.writes(inputs.k),
            "v": layout.writes(inputs.v),
            "beta": layout.beta(inputs.beta),
            "decay": layout.numbers(inputs.decay, cut.writes),
            "into": layout.numbers(carries and carries.into_writes, cut.writes),
            "documents": layout.documents(ordinals and ordinals.writes, cut.writes),
        },
        {
            "reads": layout.made(layout.new_made(inputs.k.shape[-1])),
            "values": layout.made(layout.new_made(inputs.v.shape[-1])),
            "inverse": layout.made(inverse),
        },
    )
    return Systems(made.reads, made.values, made.inverse)


def run_states(inputs: KernelInputs, systems: Systems, cut: Cut) -> States:
    """R = U - W S, S <- exp(G_C) S + (K exp(G_C - G))^T R from chunk to chunk."""
    layout, carries = Layout(cut, inputs, whole=True), inputs.carries
    made = run_kernel(
        "states",
        functools.partial(_run_states, cut, layout.chunks),
        layout,
        {
            "reads": layout.made(systems.reads),
            "values": layout.made(systems.values, split=True),
            "k": layout.writes(inputs.k),
            "out": layout.numbers(carries and carries.out_of_writes, cut.writes),
            "through": layout.numbers(carries and carries.through, 1),
            "first": layout.state(inputs.state),
        },
        {
            "before": layout.states(layout.new_states()),
            "solution": layout.made(layout.new_made(inputs.v.shape[-1]), split=True),
            "last": layout.state(inputs.state),
        },
        stages=3,
    )
    return States(made.before, made.solution, made.last)


def read_outputs(inputs: KernelInputs, states: States, cut: Cut) -> Float[Array, "B T H Dv"]:
    """O = (Q exp(G)) S + mask(Q K^T exp(G_i - G_j)) R."""
    layout = Layout(cut, inputs)
    width = inputs.v.shape[-1]
    out = jax.ShapeDtypeStruct((*inputs.q.shape[:3], width), inputs.q.dtype)
    made = run_kernel(
        "outputs",
        functools.partial(_read, cut, layout.group),
        layout,
        {
            **what_is_read(inputs, layout),
            "states": layout.states(states.before),
            "solution": layout.made(states.solution),
        },
        {"out": layout.reads(out)},
    )
    return made.out


def what_is_read(inputs: KernelInputs, layout: Layout) -> dict[str, Any]:
    """Operands of kernels that read, of one chunk each."""
    cut, carries, ordinals = layout.cut, inputs.carries, inputs.ordinals
    return {
        "q": layout.reads(inputs.q),
        "k": layout.writes(inputs.k),
        "decay": layout.numbers(inputs.decay, cut.writes),
        "into": layout.numbers(carries and carries.into_reads, cut.tokens),
        "read_documents": layout.documents(ordinals and ordinals.reads, cut.tokens),
        "documents": layout.documents(ordinals and ordinals.writes, cut.writes),
    }


def load_lower(
    cut: Cut, x: Refs, rows: slice = slice(None), columns: slice = slice(None)
) -> tuple[Array, Array | None]:
    """A part of (beta K) K^T below the diagonal, and what decay and documents multiply it with."""
    row, column = cut.written(rows), cut.written(columns)
    ordinals = None if x.documents is None else (x.documents[rows], x.documents[columns])
    factor = decay_between(cut.products, read_all(x.decay), row, column, ordinals)
    beta = x.beta[rows].astype(jnp.float32)
    keys, others = x.k[rows], x.k[columns]
    if beta.ndim == 1:
        # Half precision keys are multiplied as they are, without rounding beta k.
        product = scale(cut.products.dot(keys, others, "nt"), beta)
    else:
        product = cut.products.dot(scale(keys.astype(jnp.float32), beta), others, "nt")
    if rows == columns:
        product = jnp.where(row[:, None] > column[None, :], product, 0)
    return product, factor


def load_visible(cut: Cut, x: Refs) -> Array:
    """What token t finds of what virtual token j of its chunk wrote [C, M]; 0 if it is later."""
    row, column = cut.read(), cut.written()
    ordinals = None if x.documents is None else (x.read_documents[...], x.documents[...])
    factor = decay_between(cut.products, read_all(x.decay), row, column, ordinals)
    return jnp.where(reaches(row, column), jnp.float32(1) if factor is None else factor, 0)


def scale_by(x: Any, ref: Any, *where: Any) -> Array:
    """Scales by the factors of a reference that may be absent."""
    return x if ref is None else scale(x, ref[where] if where else ref[...])


def _solve(cut: Cut, x: Refs, y: Refs) -> None:
    parts = [slice(i, i + cut.part) for i in range(0, cut.writes, cut.part)]
    inverse: dict[tuple[int, int], Array] = {}
    for i, rows in enumerate(parts):
        inverse[i, i] = invert_unit_lower_tile(cut.products, _lower(cut, x, rows, rows))
        for j in range(i):
            # All of row i of L to the left, times the inverse above it.
            left = [_lower(cut, x, rows, parts[m]) for m in range(j, i)]
            corner = sum(
                cut.products.exact_dot(lower, inverse[m, j])
                for m, lower in zip(range(j, i), left, strict=True)
            )
            inverse[i, j] = -cut.products.exact_dot(inverse[i, i], jnp.asarray(corner))
    for i, rows in enumerate(parts):
        _write_solutions(cut, x, y, rows, [(parts[j], inverse[i, j]) for j in range(i + 1)])
    if y.inverse is not None:
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts):
                tile = inverse.get((i, j), jnp.zeros((cut.part, cut.part), jnp.float32))
                y.inverse[rows, columns] = tile.astype(y.inverse.dtype)


def _lower(cut: Cut, x: Refs, rows: slice, columns: slice) -> Array:
    product, factor = load_lower(cut, x, rows, columns)
    return product if factor is None else product * factor


def _write_solutions(
    cut: Cut, x: Refs, y: Refs, rows: slice, inverse: list[tuple[slice, Array]]
) -> None:
    """Rows of W and U, given these rows of the inverse by columns."""
    dot, dtype = cut.products.dot, cut.products.dtype
    reads = values = 0.0
    for columns, tile in inverse:
        beta = x.beta[columns].astype(jnp.float32)
        key_in = scale_by(scale(x.k[columns].astype(jnp.float32), beta), x.into, columns)
        reads += dot(tile, key_in)
        values += dot(tile, scale(x.v[columns].astype(jnp.float32), beta))
    y.reads[rows] = jnp.asarray(reads).astype(dtype)
    y.values[rows] = jnp.asarray(values).astype(dtype)


def _run_states(cut: Cut, count: int, x: Refs, y: Refs) -> None:
    dot, dtype = cut.products.dot, cut.products.dtype

    def run_chunk(c: Array, state: Array) -> Array:
        here = pl.ds(c * cut.writes, cut.writes)
        y.before[c] = state.astype(dtype)
        solution = x.values[here].astype(jnp.float32) - dot(x.reads[here], state)
        y.solution[here] = solution.astype(dtype)
        key_out = scale_by(x.k[here].astype(jnp.float32), x.out, here)
        state = state if x.through is None else state * x.through[c]
        return state + dot(key_out, solution, "tn")

    y.last[...] = jax.lax.fori_loop(0, count, run_chunk, x.first[...])


def _read(cut: Cut, group: int, x: Refs, y: Refs) -> None:
    dot = cut.products.dot
    k, visible = x.k[...], load_visible(cut, x)
    for g in range(group):
        q = x.q[:, g]
        query_in = scale_by(q.astype(jnp.float32), x.into)
        scores = dot(q, k, "nt") * visible
        out = dot(query_in, x.states[...]) + dot(scores, x.solution[...])
        y.out[:, g] = out.astype(y.out.dtype)
