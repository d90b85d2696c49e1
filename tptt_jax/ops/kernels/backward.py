"""The kernels of the gradient; the forward pass up to the outputs is run again for it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tptt_jax.array_typing import Array, Float
from tptt_jax.ops.kernels.calls import (
    COLUMNS,
    Carries,
    KernelInputs,
    Layout,
    Operand,
    Refs,
    read_wide,
    run_kernel,
)
from tptt_jax.ops.kernels.forward import (
    States,
    Systems,
    load_lower,
    load_visible,
    run_states,
    scale_by,
    solve_systems,
    what_is_read,
)
from tptt_jax.ops.kernels.tiles import Cut, decay_gradient, scale


class StateGradients(NamedTuple):
    """Gradients of what went from chunk to chunk.

    Attributes:
      after: of the states after the chunks [B, K, n, D, Dv].
      solution: of R [B, K, V, Dv].
      first: of the state before the first chunk [B, K, D, Dv], float32.
    """

    after: Float[Array, "B K n D Dv"]
    solution: Float[Array, "B K V Dv"]
    first: Float[Array, "B K D Dv"]


def run_backward(
    inputs: KernelInputs,
    grad_out: Float[Array, "B T H Dv"],
    grad_last: Float[Array, "B K D Dv"],
    cut: Cut,
) -> KernelInputs:
    """Gradients of the inputs, given those of the outputs and of the last state."""
    systems = solve_systems(inputs, cut, keep_inverse=True)
    states = run_states(inputs, systems, cut)
    wanted = _want_solution(inputs, grad_out, cut)
    grads = _run_states_back(inputs, systems, wanted, grad_out, grad_last, cut)
    reads = _pull_reads(inputs, states, grad_out, cut)
    writes = _pull_writes(inputs, systems, states, grads, reads, cut)
    carries = None
    if inputs.carries is not None:
        carries = Carries(reads.into, writes.into, writes.out, writes.through)
    return KernelInputs(
        q=reads.q,
        k=writes.k,
        v=writes.v,
        beta=writes.beta,
        state=grads.first,
        decay=writes.decay,
        carries=carries,
        ordinals=None,
    )


def _want_solution(inputs: KernelInputs, grad_out: Array, cut: Cut) -> Float[Array, "B K V Dv"]:
    """The gradient of R by the outputs of its own chunk."""
    layout = Layout(cut, inputs)
    made = run_kernel(
        "wanted",
        functools.partial(_want, cut, layout.group),
        layout,
        {**what_is_read(inputs, layout), "grad": layout.reads(grad_out)},
        {"wanted": layout.made(layout.new_made(inputs.v.shape[-1]))},
    )
    return made.wanted


def _want(cut: Cut, group: int, x: Refs, y: Refs) -> None:
    dot = cut.products.dot
    k, visible = x.k[...], load_visible(cut, x)
    total = 0.0
    for g in range(group):
        total += dot(dot(x.q[:, g], k, "nt") * visible, x.grad[:, g], "tn")
    y.wanted[...] = jnp.asarray(total).astype(y.wanted.dtype)


def _run_states_back(
    inputs: KernelInputs,
    systems: Systems,
    wanted: Array,
    grad_out: Array,
    grad_last: Array,
    cut: Cut,
) -> StateGradients:
    layout, carries = Layout(cut, inputs, whole=True), inputs.carries
    made = run_kernel(
        "states_back",
        functools.partial(_go_back, cut, layout.chunks, layout.group),
        layout,
        {
            "q": layout.reads(inputs.q),
            "k": layout.writes(inputs.k),
            "reads": layout.made(systems.reads),
            "wanted": layout.made(wanted, split=True),
            "grad": layout.reads(grad_out, split=True),
            "into": layout.numbers(carries and carries.into_reads, cut.tokens),
            "out": layout.numbers(carries and carries.out_of_writes, cut.writes),
            "through": layout.numbers(carries and carries.through, 1),
            "last": layout.state(grad_last),
        },
        {
            "after": layout.states(layout.new_states()),
            "solution": layout.made(layout.new_made(inputs.v.shape[-1]), split=True),
            "first": layout.state(inputs.state),
        },
        stages=2,
    )
    return StateGradients(made.after, made.solution, made.first)


def _go_back(cut: Cut, count: int, group: int, x: Refs, y: Refs) -> None:
    dot, dtype = cut.products.dot, cut.products.dtype

    def run_chunk(i: Array, grad: Array) -> Array:
        c = count - 1 - i
        here, tokens = pl.ds(c * cut.writes, cut.writes), pl.ds(c * cut.tokens, cut.tokens)
        y.after[c] = grad.astype(dtype)
        key_out = scale_by(x.k[here].astype(jnp.float32), x.out, here)
        solution = dot(key_out, grad) + x.wanted[here].astype(jnp.float32)
        y.solution[here] = solution.astype(dtype)
        grad = grad if x.through is None else grad * x.through[c]
        for g in range(group):
            query_in = scale_by(x.q[tokens, g].astype(jnp.float32), x.into, tokens)
            grad += dot(query_in, x.grad[tokens, g], "tn")
        return grad - dot(x.reads[here], solution, "tn")

    y.first[...] = jax.lax.fori_loop(0, count, run_chunk, x.last[...])


def _pull_reads(inputs: KernelInputs, states: States, grad_out: Array, cut: Cut) -> Refs:
    """Gradients of the queries; those of keys [B, K, V, D] and decays by what was read."""
    layout, carries = Layout(cut, inputs), inputs.carries
    return run_kernel(
        "reads_back",
        functools.partial(_read_back, cut, layout.group),
        layout,
        {
            **what_is_read(inputs, layout),
            "states": layout.states(states.before),
            "solution": layout.made(states.solution),
            "grad": layout.reads(grad_out),
        },
        {
            "q": layout.reads(inputs.q),
            "k": layout.made(layout.new_made(inputs.k.shape[-1])),
            "decay": layout.numbers(inputs.decay, cut.writes),
            "into": layout.numbers(carries and carries.into_reads, cut.tokens),
        },
    )


def _read_back(cut: Cut, group: int, x: Refs, y: Refs) -> None:
    dot = cut.products.dot
    k, visible = x.k[...], load_visible(cut, x)
    grad_key = grad_log = grad_into = 0.0
    for g in range(group):
        q = x.q[:, g]
        grad_scores, grad_query = 0.0, 0.0
        for part in _columns(x.grad):
            grad = x.grad[:, g, part]
            grad_scores += dot(grad, x.solution[:, part], "nt")
            grad_query += dot(grad, x.states[:, part], "nt")
        grad_scores *= visible
        if x.into is not None:
            grad_into += jnp.sum(grad_query * q.astype(jnp.float32), axis=1)
            grad_query = scale_by(grad_query, x.into)
        if x.decay is not None:
            grad_log += grad_scores * dot(q, k, "nt")
        y.q[:, g] = (grad_query + dot(grad_scores, k)).astype(y.q.dtype)
        grad_key += dot(grad_scores, q, "tn")
    y.k[...] = jnp.asarray(grad_key).astype(y.k.dtype)
    if y.into is not None:
        y.into[...] = grad_into
    if y.decay is not None:
        y.decay[...] = decay_gradient(cut.products, jnp.asarray(grad_log), cut.read())


def _pull_writes(
    inputs: KernelInputs,
    systems: Systems,
    states: States,
    grads: StateGradients,
    reads: Refs,
    cut: Cut,
) -> Refs:
    """Gradients of keys, values, gates and decays; those by what was read are added."""
    layout, carries, ordinals = Layout(cut, inputs), inputs.carries, inputs.ordinals
    factors: dict[str, Operand] = {
        "decay": layout.numbers(inputs.decay, cut.writes),
        "into": layout.numbers(carries and carries.into_writes, cut.writes),
        "out": layout.numbers(carries and carries.out_of_writes, cut.writes),
    }
    return run_kernel(
        "writes_back",
        functools.partial(_write_back, cut),
        layout,
        {
            **factors,
            "k": layout.writes(inputs.k),
            "v": layout.writes(inputs.v),
            "beta": layout.beta(inputs.beta),
            "documents": layout.documents(ordinals and ordinals.writes, cut.writes),
            "states": layout.states(states.before),
            "after": layout.states(grads.after),
            "solution": layout.made(states.solution),
            "wanted": layout.made(grads.solution),
            "inverse": layout.made(systems.inverse),
            "k_by_reads": layout.made(reads.k),
            "decay_by_reads": layout.numbers(reads.decay, cut.writes),
        },
        {
            **factors,
            "k": layout.writes(inputs.k),
            "v": layout.writes(inputs.v),
            "beta": layout.beta(inputs.beta),
            "through": layout.numbers(carries and carries.through, 1),
        },
    )


def _write_back(cut: Cut, x: Refs, y: Refs) -> None:
    dot, dtype = cut.products.dot, cut.products.dtype
    beta = read_wide(x.beta)
    value = dot(x.inverse[...], x.wanted[...], "tn")
    y.v[...] = scale(value, beta).astype(y.v.dtype)
    grad_beta = jnp.sum(value * read_wide(x.v), axis=1) if beta.ndim == 1 else None
    value = value.astype(dtype)

    product, factor = load_lower(cut, x)
    row = cut.written()
    grad_lower = -dot(value, x.solution[...], "nt")
    grad_lower = jnp.where(row[:, None] > row[None, :], grad_lower, 0)
    grad_lower = grad_lower if factor is None else grad_lower * factor
    if y.decay is not None:
        grad = decay_gradient(cut.products, grad_lower * product, row)
        y.decay[...] = grad + x.decay_by_reads[...]

    grad_lower = grad_lower.astype(dtype)
    into = out = through = 0.0
    for part in _columns(x.k):
        k = x.k[:, part].astype(jnp.float32)
        gate = beta if beta.ndim == 1 else x.beta[:, part].astype(jnp.float32)
        gated, state, after = scale(k, gate), x.states[part], x.after[part]
        grad_key = dot(x.solution[...], after, "nt")
        grad_gated = -dot(value, state, "nt")
        if x.into is not None:
            into += jnp.sum(grad_gated * gated, axis=1)
            out += jnp.sum(grad_key * k, axis=1)
            through += jnp.sum(after.astype(jnp.float32) * state.astype(jnp.float32))
            grad_gated, grad_key = scale_by(grad_gated, x.into), scale_by(grad_key, x.out)
        grad_gated += dot(grad_lower, k)
        grad_key += dot(grad_lower, gated, "tn") + scale(grad_gated, gate)
        grad_key += x.k_by_reads[:, part].astype(jnp.float32)
        y.k[:, part] = grad_key.astype(y.k.dtype)
        if grad_beta is not None:
            grad_beta += jnp.sum(grad_gated * k, axis=1)
        else:
            # Tiles cannot be cut: these columns of `value` once more.
            of_value = dot(x.inverse[...], x.wanted[:, part], "tn")
            of_gate = grad_gated * k + of_value * x.v[:, part].astype(jnp.float32)
            y.beta[:, part] = of_gate.astype(y.beta.dtype)
    if grad_beta is not None:
        y.beta[...] = grad_beta.astype(y.beta.dtype)
    if y.into is not None:
        y.into[...], y.out[...], y.through[...] = into, out, through


def _columns(ref: Any) -> list[slice]:
    width = ref.shape[-1]
    return [slice(i, min(i + COLUMNS, width)) for i in range(0, width, COLUMNS)]
