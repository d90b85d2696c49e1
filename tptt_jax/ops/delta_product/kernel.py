"""The DeltaProduct operator as Pallas kernels for NVIDIA GPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tptt_jax.array_typing import Array, Float, Int, SegmentIds, State
from tptt_jax.ops.delta_product.inputs import is_default_precision, silence_padding
from tptt_jax.ops.delta_product.kernels.calls import KernelInputs
from tptt_jax.ops.delta_product.kernels.partition import backward, forward
from tptt_jax.ops.delta_product.kernels.tiles import Cut, Products
from tptt_jax.ops.delta_product.plan import kernel_chunk_size, power_of_2
from tptt_jax.ops.devices import platform_of
from tptt_jax.ops.documents import document_ordinals

# Fewer channels do not fill a matrix instruction.
_FEWEST_CHANNELS = 16
# exp of smaller numbers is 0 in float32, and 0 * -inf would be NaN.
_LOWEST_DECAY = -1000


def kernel_delta_product(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T N K D"],
    v: Float[Array, "B T N K Dv"],
    beta: Float[Array, "B T N K"] | Float[Array, "B T N K D"],
    log_decay: Float[Array, "B T K"] | None,
    state: State,
    segment_ids: SegmentIds | None,
    precision: jax.lax.PrecisionLike,
) -> tuple[Float[Array, "B T H Dv"], State]:
    """`chunk_delta_product` by kernels, interpreted where there is no GPU.

    Chunks have 64 virtual tokens. bfloat16 inputs at the default precision are multiplied as
    bfloat16 numbers, W, U, R and states rounded to them; others as TF32, or as three TF32 products
    that keep all bits of float32. The state from chunk to chunk and the inverse of (I + L) are
    float32 until they are multiplied.

    Args:
      q: queries [B, T, H, D].
      k: keys [B, T, N, K, D].
      v: values [B, T, N, K, Dv].
      beta: write gate [B, T, N, K] or [B, T, N, K, D].
      log_decay: [B, T, K] or None.
      state: before the first token [B, K, D, Dv], float32.
      segment_ids: document ids [B, T] or None.
      precision: of products.

    Returns:
      Output [B, T, H, Dv] in q's dtype and the last state, float32.
    """
    _, length, _, dim = q.shape
    value_dim = v.shape[-1]
    half = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    rounded = half and is_default_precision(precision)
    products = Products(
        dtype=jnp.dtype(jnp.bfloat16 if rounded else jnp.float32),
        exact=not is_default_precision(precision),
        interpret=platform_of(q, k, v) != "gpu",
    )
    ordinals = None
    if segment_ids is not None:
        valid = segment_ids != 0
        q, k, v, beta = silence_padding(valid, (q, k, v, beta))
        log_decay = silence_padding(valid, log_decay)
        ordinals = document_ordinals(segment_ids)
    steps = k.shape[2]
    cut = Cut(kernel_chunk_size(steps), power_of_2(steps), products)
    inputs = _arrange(q, k, v, beta, log_decay, state, ordinals, cut)
    out, last = _call(inputs, cut)
    return out[:, :length, :, :value_dim], last[..., :dim, :value_dim]


def _call(inputs: KernelInputs, cut: Cut) -> tuple[Array, Array]:
    return _run(inputs, cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _run(inputs: KernelInputs, cut: Cut) -> tuple[Array, Array]:
    return forward(inputs, cut)


def _run_forward(inputs: KernelInputs, cut: Cut) -> tuple[tuple[Array, Array], KernelInputs]:
    return _run(inputs, cut), inputs


def _run_backward(
    cut: Cut, inputs: KernelInputs, gradients: tuple[Array, Array]
) -> tuple[KernelInputs]:
    grads = backward(inputs, *gradients, cut)
    if inputs.ordinals is not None:
        none: Any = np.zeros(inputs.ordinals.shape, jax.dtypes.float0)
        grads = grads._replace(ordinals=none)
    return (grads,)


_run.defvjp(_run_forward, _run_backward)


def _arrange(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    state: Array,
    ordinals: Int[Array, "B T"] | None,
    cut: Cut,
) -> KernelInputs:
    """Pads tokens to whole chunks, and steps and channels to powers of 2, with inert numbers."""
    batch, length, _, dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    tokens = -(-length // cut.tokens) * cut.tokens
    width, value_width = _channels(dim), _channels(value_dim)
    per_channel = beta.ndim == 5
    if per_channel:
        # One width for the channels of keys and values.
        width = value_width = max(width, value_width)
        beta = _pad(beta, {1: tokens, 2: cut.steps, 4: width})
        beta = beta.reshape(batch, tokens * cut.steps, kv_heads, width)
    else:
        beta = _pad(beta, {1: tokens, 2: cut.steps})
        beta = jnp.swapaxes(beta.reshape(batch, tokens * cut.steps, kv_heads), 1, 2)
    k = _pad(k, {1: tokens, 2: cut.steps, 4: width})
    v = _pad(v, {1: tokens, 2: cut.steps, 4: value_width})
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), _LOWEST_DECAY)
        log_decay = jnp.swapaxes(_pad(log_decay, {1: tokens}), 1, 2)
    if ordinals is not None:
        # Filler tokens beyond the row's end must not start a document.
        ordinals = jnp.pad(ordinals, ((0, 0), (0, tokens - length)), mode="edge")
    return KernelInputs(
        q=_pad(q, {1: tokens, 3: width}),
        k=k.reshape(batch, -1, kv_heads, width),
        v=v.reshape(batch, -1, kv_heads, value_width),
        beta=beta,
        state=_pad(state, {2: width, 3: value_width}),
        log_decay=log_decay,
        ordinals=ordinals,
    )


def _channels(size: int) -> int:
    return max(power_of_2(size), _FEWEST_CHANNELS)


def _pad(x: Array, sizes: dict[int, int]) -> Array:
    """Zeros behind, up to the sizes by axis."""
    margin = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, margin) if any(after for _, after in margin) else x
