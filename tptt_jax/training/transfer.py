"""A pass of the base model that gives every layer the tokens evicted from its window.

The hidden states are the base model's own throughout: each layer sees its inputs of pretraining,
and its memory affects no other layer. So all memories can be fitted in one pass, with gradients
inside each layer only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tptt_jax.array_typing import Array, Hidden, Int, SegmentIds, Tokens
from tptt_jax.config import LayerKind
from tptt_jax.decoder import DecoderLayer, Stack, apply_norm
from tptt_jax.layers.eviction import Evicted, evict
from tptt_jax.layers.liza import LizaAttention, Projected
from tptt_jax.layers.norm import NormLayer
from tptt_jax.layers.softmax_attention import TokenContext, apply_softmax, softmax_settings
from tptt_jax.model import CausalLM
from tptt_jax.ops.attention import Attended
from tptt_jax.training.layer_pass import Rows, scan_layers

Visit = Callable[[LizaAttention, "LayerView"], Any]
# Of whole documents, and of a window.
Contexts = tuple[TokenContext, TokenContext]


class LayerView(NamedTuple):
    """One layer of the base model, with and without a window.

    Attributes:
      made: queries, keys and values.
      full: the base model's own attention.
      windowed: attention to the window and the sinks alone.
      lost: the tokens that leave the window.
      residual: what the layer reads, before its norm [B, T, E].
      post_norm: of what the attention adds to that; None: it has none.
    """

    made: Projected
    full: Attended
    windowed: Attended
    lost: Evicted
    residual: Hidden
    post_norm: NormLayer | None


def visit_layers(
    model: CausalLM,
    tokens: Tokens,
    segment_ids: SegmentIds | None,
    visit: Visit,
    *,
    window: Int[Array, ""] | None = None,
) -> list[Any]:
    """Runs the base model, and `visit` on every layer whose attention a Titan's window narrows.

    Those are the layers with a memory of evicted tokens, if there is one.

    Args:
      model: a Titan behind a window, whose memory does not write every token.
      tokens: [B, T].
      segment_ids: packed documents, 0 = padding; None: one document per row.
      visit: attention module and view to arrays; it is traced once for each shape of layers.
      window: below the model's own, as a traced scalar; None: the model's own.

    Returns:
      Results of `visit`, for every stack of layers with a leading axis over its layers with a
      window; None for a stack without any.
    """
    rows = Rows.arrange(tokens, segment_ids)
    whole, narrow = rows.contexts(model, None), rows.contexts(model, model.liza, window)
    contexts: dict[LayerKind, Contexts] = {kind: (whole[kind], narrow[kind]) for kind in whole}
    found = scan_layers(model, rows, functools.partial(_visit_where_narrowed, contexts, visit))
    return [_take_narrowed(stack, seen) for stack, seen in zip(model.stacks, found, strict=True)]


def _take_narrowed(stack: Stack, seen: Any) -> Any:
    layers = np.flatnonzero([kind == "full" for kind in stack.kinds])
    return jax.tree.map(lambda leaf: leaf[layers], seen)


def _visit_where_narrowed(
    contexts: dict[LayerKind, Contexts],
    visit: Visit,
    kinds: tuple[LayerKind, ...],
    layer: DecoderLayer,
    x: Array,
    number: Array,
) -> tuple[Array, Any]:
    """The next layer's input, and the result of `visit`, or zeros for layers of another kind."""
    made = layer.self_attn.project(apply_norm(layer.attn_norm, x))

    def run(kind: LayerKind, made: Projected) -> tuple[Array, Any]:
        return _visit_layer(layer, kind, contexts[kind], x, made, visit)

    def skip(kind: LayerKind, made: Projected) -> tuple[Array, Any]:
        full = _full_attention(layer.self_attn, kind, contexts[kind][0], made).out
        shown = [functools.partial(run, other) for other in kinds if other == "full"]
        seen = jax.eval_shape(shown[0], made)[1] if shown else None
        return full, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)

    options = [functools.partial(run if kind == "full" else skip, kind) for kind in kinds]
    full, seen = lax.switch(number, options, made)
    return layer.add(x, layer.self_attn.project_out(full)), seen


def _visit_layer(
    layer: DecoderLayer,
    kind: LayerKind,
    contexts: Contexts,
    x: Hidden,
    made: Projected,
    visit: Visit,
) -> tuple[Array, Any]:
    """The base model's attention [B, T, H, D], and the result of `visit`."""
    attention, (whole, narrow) = layer.self_attn, contexts
    full = _full_attention(attention, kind, whole, made)
    settings = softmax_settings(attention.config, attention.liza, kind)
    qkv = (made.soft_q, made.soft_k, made.soft_v)
    windowed, _ = apply_softmax(settings, narrow, *qkv)
    lost = evict(settings, narrow, made.soft_k, made.soft_v)
    view = LayerView(made, full, windowed, lost, x, layer.attn_post_norm)
    return full.out, visit(attention, view)


def _full_attention(
    attention: LizaAttention, kind: LayerKind, context: TokenContext, made: Projected
) -> Attended:
    settings = softmax_settings(attention.config, None, kind)._replace(needs_mass=True)
    return apply_softmax(settings, context, made.soft_q, made.soft_k, made.soft_v)[0]
