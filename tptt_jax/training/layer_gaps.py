"""Which layers lose most to a window: where keeping full attention is worth its cache."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptt_jax.array_typing import Array, Float, SegmentIds, Tokens
from tptt_jax.config import layer_kinds
from tptt_jax.decoder import apply_norm
from tptt_jax.layers.liza import LizaAttention
from tptt_jax.model import CausalLM
from tptt_jax.training.transfer import LayerView, visit_layers


def layer_gaps(
    model: CausalLM, rows: Iterable[tuple[Tokens, SegmentIds | None]]
) -> dict[int, float]:
    """How far a window throws the output of each layer's attention off, in the base model.

    That is the root mean square, over tokens behind which the window has lost some, of
    |windowed - full| / |x|: x is the residual stream that the layer reads, and what the attention
    adds to it is compared after its projection and norm.

    Args:
      model: a Titan behind a window, whose memory plays no part; not one that writes every token.
      rows: tokens [B, T] and segment ids; None: one document per row.

    Returns:
      The relative error of each layer with that window, by its number.

    Raises:
      ValueError: if no token of the rows leaves the window.
    """
    totals = np.zeros((2, 0))
    for tokens, segment_ids in rows:
        found = np.concatenate([x for x in _sums(model, tokens, segment_ids) if x is not None], 1)
        totals = found if not totals.size else totals + found
    if not totals.size or not totals[1].all():
        raise ValueError(
            "no token leaves the window in the rows that full layers are chosen by: give rows that "
            "are longer than softmax_window + softmax_sinks."
        )
    kinds = layer_kinds(model.config, model.liza)
    layers = [layer for layer, kind in enumerate(kinds) if kind == "full"]
    return dict(zip(layers, np.sqrt(totals[0] / totals[1]).tolist(), strict=True))


def choose_full_layers(gaps: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The layers with the largest gaps, in order.

    Args:
      gaps: from `layer_gaps`.
      count: how many; at least one layer must be left for the memory.

    Raises:
      ValueError: if the model has too few layers for that.
    """
    if not 1 <= count < len(gaps):
        raise ValueError(
            f"{count} full layers were asked for, but of this model's {len(gaps)} layers with full "
            f"attention 1 to {len(gaps) - 1} can keep it: the others have the window."
        )
    return tuple(sorted(sorted(gaps, key=lambda layer: (-gaps[layer], layer))[:count]))


@nnx.jit
def _sums(
    model: CausalLM, tokens: Tokens, segment_ids: SegmentIds | None
) -> list[Float[Array, "2 M"] | None]:
    """Squared relative errors and the tokens that count, of each stack's layers."""

    def visit(attention: LizaAttention, view: LayerView) -> Array:
        added = [
            apply_norm(view.post_norm, attention.project_out(out)).astype(jnp.float32)
            for out in (view.windowed.out, view.full.out)
        ]
        error, x = added[0] - added[1], view.residual.astype(jnp.float32)
        ratio = jnp.sum(error * error, -1) / jnp.maximum(jnp.sum(x * x, -1), 1e-12)
        # Attention gives zeros at padding.
        counts = (view.lost.held > 0) & jnp.any(view.full.out != 0, axis=(2, 3))
        return jnp.stack([jnp.sum(jnp.where(counts, ratio, 0)), jnp.sum(counts)])

    found = visit_layers(model, tokens, segment_ids, visit)
    return [None if sums is None else sums.T for sums in found]
