"""The kernels of the gradient, which recompute the forward pass up to the outputs.

The result of a product is never transposed for another product, but recomputed transposed: Triton
3.4 to 3.7.0 miscompiles that for Hopper (triton-lang/triton, seen by flash-linear-attention 640).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tptt_jax.array_typing import Array, Float
from tptt_jax.ops.delta_product.kernels.calls import (
    KernelInputs,
    Layout,
    Refs,
    columns_of,
    read_wide,
    run_kernel,
)
from tptt_jax.ops.delta_product.kernels.factors import Factors, decay_gradient, make_factors
from tptt_jax.ops.delta_product.kernels.forward import (
    States,
    Systems,
    decay_below,
    decay_visible,
    read_operands,
    run_states,
    scale_by,
    solve_systems,
    write_operands,
)
from tptt_jax.ops.delta_product.kernels.tiles import Cut, diagonal, scale


class StateGradients(NamedTuple):
    """Gradients of the states and of R.

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
    factors = make_factors(inputs.log_decay, inputs.ordinals, inputs.k.shape[2], cut)
    systems = solve_systems(inputs, factors, cut, keep_inverse=True)
    states = run_states(inputs, factors, systems, cut)
    grad_solution = _run_grad_solution(inputs, factors, grad_out, cut)
    grads = _run_states_back(inputs, factors, systems, grad_solution, (grad_out, grad_last), cut)
    reads = _run_reads_back(inputs, factors, states, grad_out, cut)
    writes = _run_writes_back(inputs, factors, systems, states, grads, reads.k, cut)
    log_decay = None
    if inputs.log_decay is not None:
        log_decay = decay_gradient(reads.until, writes.until, writes.end, cut)
    return KernelInputs(
        q=reads.q,
        k=writes.k,
        v=writes.v,
        beta=writes.beta,
        state=grads.first,
        log_decay=log_decay,
        ordinals=None,
    )


def _run_grad_solution(
    inputs: KernelInputs, factors: Factors, grad_out: Array, cut: Cut
) -> Float[Array, "B K V Dv"]:
    """The gradient of R by the outputs of its own chunk."""
    layout = Layout(cut, inputs)
    made = run_kernel(
        "grad_solution",
        functools.partial(_grad_solution, cut, layout.group),
        layout,
        {**read_operands(inputs, factors, layout), "grad": layout.reads(grad_out)},
        {"grad_solution": layout.intermediate(layout.new_intermediate(inputs.v.shape[-1]))},
    )
    return made.grad_solution


def _grad_solution(cut: Cut, group: int, x: Refs, y: Refs) -> None:
    dot = cut.products.dot
    k, visible = x.k[...], decay_visible(cut, x, transposed=True)
    total = 0.0
    for g in range(group):
        scores = dot(k, x.q[:, g], "nt") * visible
        total += dot(scores, x.grad[:, g])
    y.grad_solution[...] = jnp.asarray(total).astype(y.grad_solution.dtype)


def _run_states_back(
    inputs: KernelInputs,
    factors: Factors,
    systems: Systems,
    grad_solution: Array,
    grads: tuple[Array, Array],
    cut: Cut,
) -> StateGradients:
    layout = Layout(cut, inputs, whole=True)
    grad_out, grad_last = grads
    made = run_kernel(
        "states_back",
        functools.partial(_states_back, cut, layout.chunks, layout.group),
        layout,
        {
            "q": layout.reads(inputs.q),
            "k": layout.writes(inputs.k),
            "reads": layout.intermediate(systems.reads),
            "grad_solution": layout.intermediate(grad_solution, split=True),
            "grad": layout.reads(grad_out, split=True),
            "into": layout.numbers(factors.into_reads, cut.tokens),
            "out": layout.numbers(factors.out_of_writes, cut.writes),
            "through": layout.numbers(factors.through, 1),
            "last": layout.state(grad_last),
        },
        {
            "after": layout.states(layout.new_states()),
            "solution": layout.intermediate(
                layout.new_intermediate(inputs.v.shape[-1]), split=True
            ),
            "first": layout.state(inputs.state),
        },
        # The next chunk's queries are prefetched to shared memory, where those of many heads do
        # not fit.
        stages=2 if layout.group * cut.products.dtype.itemsize <= 4 else 1,
    )
    return StateGradients(made.after, made.solution, made.first)


def _states_back(cut: Cut, count: int, group: int, x: Refs, y: Refs) -> None:
    dot, dtype = cut.products.dot, cut.products.dtype

    def run_chunk(i: Array, grad: Array) -> Array:
        c = count - 1 - i
        here, tokens = pl.ds(c * cut.writes, cut.writes), pl.ds(c * cut.tokens, cut.tokens)
        y.after[c] = grad.astype(dtype)
        key_out = scale_by(read_wide(x.k, here), x.out, here)
        solution = dot(key_out, grad) + read_wide(x.grad_solution, here)
        y.solution[here] = solution.astype(dtype)
        grad = grad if x.through is None else grad * x.through[c]
        for g in range(group):
            query_in = scale_by(read_wide(x.q, tokens, g), x.into, tokens)
            grad += dot(query_in, x.grad[tokens, g], "tn")
        return grad - dot(x.reads[here], solution, "tn")

    y.first[...] = jax.lax.fori_loop(0, count, run_chunk, x.last[...])


def _run_reads_back(
    inputs: KernelInputs, factors: Factors, states: States, grad_out: Array, cut: Cut
) -> Refs:
    """Gradients of the queries and, by what was read, of keys [B, K, V, D] and sums of decays."""
    layout = Layout(cut, inputs)
    return run_kernel(
        "reads_back",
        functools.partial(_reads_back, cut, layout.group),
        layout,
        {
            **read_operands(inputs, factors, layout),
            "states": layout.states(states.before),
            "solution": layout.intermediate(states.solution),
            "grad": layout.reads(grad_out),
        },
        {
            "q": layout.reads(inputs.q),
            "k": layout.intermediate(layout.new_intermediate(inputs.k.shape[-1])),
            "until": layout.numbers(inputs.log_decay, cut.tokens),
        },
    )


def _reads_back(cut: Cut, group: int, x: Refs, y: Refs) -> None:
    dot = cut.products.dot
    k, visible = x.k[...], decay_visible(cut, x)
    visible_transposed = decay_visible(cut, x, transposed=True)
    grad_key = until = 0.0
    for g in range(group):
        q = x.q[:, g]
        grad_scores = transposed = grad_query = 0.0
        for part in columns_of(x.grad):
            grad, solution = x.grad[:, g, part], x.solution[:, part]
            grad_scores += dot(grad, solution, "nt")
            transposed += dot(solution, grad, "nt")
            grad_query += dot(grad, x.states[:, part], "nt")
        grad_query = scale_by(grad_query, x.into) + dot(grad_scores * visible, k)
        y.q[:, g] = grad_query.astype(y.q.dtype)
        grad_key += dot(transposed * visible_transposed, q)
        if y.until is not None:
            until += jnp.sum(grad_query * q.astype(jnp.float32), axis=1)
    y.k[...] = jnp.asarray(grad_key).astype(y.k.dtype)
    if y.until is not None:
        y.until[...] = until


def _run_writes_back(
    inputs: KernelInputs,
    factors: Factors,
    systems: Systems,
    states: States,
    grads: StateGradients,
    grad_key: Array,
    cut: Cut,
) -> Refs:
    """Gradients of keys (grad_key is that by what was read), values, gates, sums of decays."""
    layout = Layout(cut, inputs)
    ends = None if inputs.log_decay is None else factors.through
    return run_kernel(
        "writes_back",
        functools.partial(_writes_back, cut),
        layout,
        {
            **write_operands(inputs, factors, layout),
            "v": layout.writes(inputs.v),
            "into": layout.numbers(factors.into_writes, cut.writes),
            "out": layout.numbers(factors.out_of_writes, cut.writes),
            "through": layout.numbers(ends, 1),
            "states": layout.states(states.before),
            "after": layout.states(grads.after),
            "solution": layout.intermediate(states.solution),
            "grad_solution": layout.intermediate(grads.solution),
            "inverse": layout.intermediate(systems.inverse),
            "k_by_reads": layout.intermediate(grad_key),
        },
        {
            "k": layout.writes(inputs.k),
            "v": layout.writes(inputs.v),
            "beta": layout.beta(inputs.beta),
            "until": layout.numbers(factors.decay, cut.writes),
            "end": layout.numbers(ends, 1),
        },
    )


def _writes_back(cut: Cut, x: Refs, y: Refs) -> None:
    dot, dtype = cut.products.dot, cut.products.dtype
    beta = read_wide(x.beta)
    per_channel = beta.ndim == 2
    value = dot(x.inverse[...], x.grad_solution[...], "tn")
    y.v[...] = scale(value, beta).astype(y.v.dtype)
    grad_beta = 0.0 if per_channel else jnp.sum(value * read_wide(x.v), axis=1)
    value = value.astype(dtype)
    solution = x.solution[...]
    grad_lower = (-dot(value, solution, "nt") * decay_below(cut, x)).astype(dtype)
    transposed = -dot(solution, value, "nt") * decay_below(cut, x, transposed=True)
    transposed = transposed.astype(dtype)
    until = end = jnp.float32(0)
    for part in columns_of(x.k):
        k = read_wide(x.k, slice(None), part)
        gate = read_wide(x.beta, slice(None), part) if per_channel else beta
        gated, state, after = scale(k, gate), x.states[part], x.after[part]
        grad_key = scale_by(dot(x.solution[...], after, "nt"), x.out)
        if y.end is not None:
            # Operands of a product need not lie in registers.
            kept = jnp.sum(diagonal(dot(state, after, "nt")))
            end += kept * x.through[...] + jnp.sum(grad_key * k)
        grad_key += dot(transposed, gated) + read_wide(x.k_by_reads, slice(None), part)
        grad_gated = scale_by(-dot(value, state, "nt"), x.into) + dot(grad_lower, k)
        if y.until is not None:
            until += jnp.sum(grad_gated * gated - grad_key * k, axis=1)
        y.k[:, part] = (grad_key + scale(grad_gated, gate)).astype(y.k.dtype)
        if per_channel:
            # Tiles cannot be sliced: recompute these columns of `value`.
            of_value = dot(x.inverse[...], x.grad_solution[:, part], "tn")
            of_gate = grad_gated * k + of_value * read_wide(x.v, slice(None), part)
            y.beta[:, part] = of_gate.astype(y.beta.dtype)
        else:
            grad_beta += jnp.sum(grad_gated * k, axis=1)
    if not per_channel:
        y.beta[...] = jnp.asarray(grad_beta).astype(y.beta.dtype)
    if y.until is not None and y.end is not None:
        y.until[...], y.end[...] = until, end
