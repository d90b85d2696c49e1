"""What the memory of each layer does on a row of text: its share, and how healthy its state is."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, Float, SegmentIds, Tokens
from tptt_jax.config import LayerKind, layer_kinds
from tptt_jax.decoder import DecoderLayer, apply_norm
from tptt_jax.layers.eviction import evict
from tptt_jax.layers.gates import MassGate
from tptt_jax.layers.liza import LayerTokens, LizaAttention, Projected
from tptt_jax.layers.memory import MemoryTokens
from tptt_jax.layers.softmax_attention import TokenContext, apply_softmax, softmax_settings
from tptt_jax.model import CausalLM
from tptt_jax.ops.delta_product import chunk_delta_product
from tptt_jax.ops.delta_product.diagnostics import chunk_condition, half_life, relative_norm
from tptt_jax.training.layer_pass import Rows, scan_layers


class MemoryHealth(NamedTuple):
    """Of the layers whose memory runs, in order [M], float32.

    Attributes:
      share: of the memory in the mixed output, the mean over heads and over the tokens behind which
        the memory holds something; 1 in a purely linear model.
      half_life: tokens after which the forget gate has halved what was written, see `half_life`.
      state_norm: of the state after the last token, see `relative_norm`.
      condition: of the worst chunk, see `chunk_condition`.
    """

    share: Float[Array, "M"]
    half_life: Float[Array, "M"]
    state_norm: Float[Array, "M"]
    condition: Float[Array, "M"]


def memory_layers(model: CausalLM) -> tuple[int, ...]:
    """The numbers of the layers whose memory runs."""
    kinds, liza = layer_kinds(model.config, model.liza), model.liza
    return tuple(i for i, kind in enumerate(kinds) if liza is not None and liza.runs_memory(kind))


def measure_memory(
    model: CausalLM, tokens: Tokens, segment_ids: SegmentIds | None = None
) -> MemoryHealth:
    """Runs the model on rows, and describes the memory of each layer.

    Args:
      model: a Titan.
      tokens: [B, T]; one row is enough, with a part that has left the window.
      segment_ids: packed documents, 0 = padding; None: one document per row.

    Returns:
      An entry for each of `memory_layers`. All but the share is NaN for the operator
      "tptt_reference", whose state is made otherwise.
    """
    found = _measure(model, tokens, segment_ids)
    runs = [np.flatnonzero(stack.runs_memory) for stack in model.stacks]
    kept = [each[layers] for each, layers in zip(found, runs, strict=True)]
    return MemoryHealth(*jnp.concatenate(kept).T)


@nnx.jit
def _measure(
    model: CausalLM, tokens: Tokens, segment_ids: SegmentIds | None
) -> list[Float[Array, "L 4"]]:
    """The measures of all layers of each stack; zeros where no memory runs."""
    rows = Rows.arrange(tokens, segment_ids)
    contexts = rows.contexts(model, model.liza)
    share = None if model.mag_share is None else model.mag_share[...]

    def body(
        kinds: tuple[LayerKind, ...], layer: DecoderLayer, x: Array, number: Array
    ) -> tuple[Array, Array]:
        def run(kind: LayerKind, x: Array) -> Array:
            made = layer.self_attn.project(apply_norm(layer.attn_norm, x))
            return _layer_health(layer.self_attn, kind, contexts[kind], made, share)

        def skip(x: Array) -> Array:
            return jnp.zeros(4)

        running = {
            kind for kind in kinds if model.liza is not None and model.liza.runs_memory(kind)
        }
        options = [functools.partial(run, kind) if kind in running else skip for kind in kinds]
        health = lax.switch(number, options, x)
        x, _ = layer(x, LayerTokens(contexts, kinds, number, share=share))
        return x, health

    return scan_layers(model, rows, body)


def _layer_health(
    attention: LizaAttention,
    kind: LayerKind,
    context: TokenContext,
    made: Projected,
    scheduled: Array | None,
) -> Float[Array, "4"]:
    """The fields of `MemoryHealth` for one layer."""
    liza, memory = attention.liza, attention.memory
    assert liza is not None
    assert memory is not None
    share, tokens = _share_and_tokens(attention, kind, context, made, scheduled)
    if liza.operator == "tptt_reference":
        return jnp.array([1.0, jnp.nan, jnp.nan, jnp.nan]).at[0].set(share)
    keys, values, beta, log_decay = memory.written(made.x, tokens)
    activation = liza.recurrence.state_activation
    state = chunk_delta_product(
        keys[:, :, 0],
        keys,
        values,
        beta,
        log_decay,
        # Chunks that activate the state are those of rows.
        segment_ids=tokens.segment_ids if activation == "none" else None,
        chunk_size=liza.chunk_size,
        state_activation=activation,
    )[1]
    valid = tokens.valid if tokens.writes is None else tokens.valid & tokens.writes
    beta = jnp.where(valid.reshape(*valid.shape, *(1,) * (beta.ndim - 2)), beta, 0)
    measures = (
        share,
        half_life(log_decay, valid),
        relative_norm(state, values, valid),
        chunk_condition(keys, beta, log_decay, tokens.segment_ids, liza.chunk_size),
    )
    return jnp.stack([jnp.asarray(each, jnp.float32) for each in measures])


def _share_and_tokens(
    attention: LizaAttention,
    kind: LayerKind,
    context: TokenContext,
    made: Projected,
    scheduled: Array | None,
) -> tuple[Float[Array, ""], MemoryTokens]:
    """The memory's mean share, and what it is given."""
    liza = attention.liza
    assert liza is not None
    if liza.writes != "evicted":
        tokens = MemoryTokens(made.k, made.v, context.segment_ids)
        if not liza.softmax:
            return jnp.ones(()), tokens
        assert not isinstance(attention.mag, MassGate)
        share = scheduled if attention.mag is None else attention.mag()
        return jnp.mean(jnp.asarray(share)), tokens
    settings = softmax_settings(attention.config, liza, kind)
    lost = evict(settings, context, made.soft_k, made.soft_v)
    attended, _ = apply_softmax(settings, context, made.soft_q, made.soft_k, made.soft_v)
    shares = attention.evicted_share(made, attended, lost, scheduled)
    by_token, counted = jnp.mean(shares, axis=(2, 3)), lost.held > 0
    total = jnp.sum(jnp.where(counted, by_token, 0))
    return total / jnp.maximum(jnp.sum(counted), 1), lost.tokens
