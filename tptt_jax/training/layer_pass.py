"""A pass over rows of text that runs a function on every layer of a model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from tptt_jax.array_typing import Array, Hidden, Int, Positions, SegmentIds, Tokens
from tptt_jax.config import LayerKind, LizaConfig, layer_kinds
from tptt_jax.decoder import DecoderLayer
from tptt_jax.layers.softmax_attention import TokenContext, token_context
from tptt_jax.model import CausalLM
from tptt_jax.ops.documents import count_positions, order_padding, take_places

Body = Callable[[tuple[LayerKind, ...], DecoderLayer, Hidden, Array], tuple[Hidden, Any]]


class Rows(NamedTuple):
    """Rows of tokens as layers read them: the padding of a row is at its end.

    Attributes:
      tokens: [B, T].
      segment_ids: [B, T]; None: one document per row.
      positions: [B, T] within the document.
    """

    tokens: Tokens
    segment_ids: SegmentIds | None
    positions: Positions

    @classmethod
    def arrange(cls, tokens: Tokens, segment_ids: SegmentIds | None) -> Self:
        """Moves padding, which may lie anywhere, to the end of its row."""
        if segment_ids is not None:
            order = order_padding(segment_ids)
            tokens, segment_ids = (take_places(x, order) for x in (tokens, segment_ids))
        return cls(tokens, segment_ids, count_positions(tokens.shape, segment_ids, None))

    def contexts(
        self, model: CausalLM, liza: LizaConfig | None, window: Int[Array, ""] | None = None
    ) -> dict[LayerKind, TokenContext]:
        """What attention knows of the tokens, for each kind of the model's layers.

        Args:
          model: whose layers read the rows.
          liza: has the window; None: the base model's own attention.
          window: below that of `liza`, as a traced scalar; None: that of `liza`.
        """
        place = (self.positions, self.segment_ids, None, window)
        kinds = dict.fromkeys(layer_kinds(model.config, model.liza))
        return {kind: token_context(model.config, liza, kind, *place) for kind in kinds}


def scan_layers(model: CausalLM, rows: Rows, body: Body) -> list[Any]:
    """Runs `body` on every layer in turn.

    Args:
      model: its stacks are scanned, so `body` is traced once for each.
      rows: of text.
      body: the different kinds of a stack's layers, a layer, its input [B, T, E], and the index of
        its kind, to the next layer's input and outputs.

    Returns:
      The outputs of each stack, with a leading axis of layers.
    """
    x, found = model.embed(rows.tokens, rows.positions), []
    for stack in model.stacks:
        kinds, numbers = stack.kind_numbers
        x, outputs = stack.scan(functools.partial(body, kinds), x, numbers)
        found.append(outputs)
    return found
