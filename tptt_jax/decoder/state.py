"""The decoding state: everything that a model carries from call to call."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Bool, Float, Hidden, Int, SegmentIds, Tokens
from tptt_jax.config import (
    LayerKind,
    LizaConfig,
    ModelConfig,
    Writes,
    layer_kinds,
    runs_memory,
)
from tptt_jax.decoder.stack_cache import StackCache, init_stack_caches
from tptt_jax.layers.cache import num_sinks, softmax_window

_SMALLEST_CACHE = 512


class RingLayout(NamedTuple):
    """What the caches of the layers of one kind were made for.

    Attributes:
      kind: of the layers.
      window: tokens that their softmax attention sees; None: all.
      sinks: first tokens that stay visible.
    """

    kind: LayerKind
    window: int | None
    sinks: int


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class StateLayout:
    """What a decoding state was made for, as far as the shapes of its arrays do not tell.

    It is static: `jax.jit`, `jax.tree.map` and loops hand it on and never trace it.
    """

    rings: tuple[RingLayout, ...]
    """One for each kind of layers; empty in a purely linear model."""
    writes: Writes | None
    """Tokens that the memories hold (`LizaConfig.writes`); None: there is no memory."""

    @classmethod
    def of(cls, config: ModelConfig, liza: LizaConfig | None, *, use_memory: bool) -> "StateLayout":
        """The layout of a model's states.

        Args:
          config: of the model.
          liza: of its memory; None: the plain base model.
          use_memory: False: without its memories.
        """
        kinds = dict.fromkeys(layer_kinds(config, liza))
        if liza is not None and not liza.softmax:
            kinds = {}
        rings = (
            RingLayout(kind, softmax_window(config, liza, kind), num_sinks(config, liza, kind))
            for kind in kinds
        )
        has_memory = liza is not None and use_memory and runs_memory(config, liza)
        return cls(rings=tuple(rings), writes=liza.writes if liza and has_memory else None)


class DecodingState(NamedTuple):
    """Everything that a model needs of the previous tokens.

    `tptt_jax.init_cache` makes it, and each call of the model returns the next one. A model with
    another window, other sinks or another dtype refuses it.

    Attributes:
      stacks: caches and memories, one for each stack of layers. Memories are None in a state that
        leaves them out.
      length: tokens of each row so far [B], int32.
      hidden: of each row's last token, after the last norm [B, E]; zero before the first.
      seen: which tokens each row holds, for the repetition penalty [B, V].
      layout: what the state was made for; static.
    """

    stacks: tuple[StackCache, ...]
    length: Int[Array, "B"]
    hidden: Float[Array, "B E"]
    seen: Bool[Array, "B V"]
    layout: StateLayout

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.hidden.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def has_memory(self) -> bool:
        """Whether the memory is written."""
        return any(stack.memory is not None for stack in self.stacks)

    def advance(
        self,
        stacks: tuple[StackCache, ...],
        tokens: Tokens,
        segment_ids: SegmentIds | None,
        hidden: Hidden,
    ) -> "DecodingState":
        """The state after the tokens of a call.

        Args:
          stacks: the new caches and memories.
          tokens: of the call [B, T].
          segment_ids: 0 marks padding, which changes nothing [B, T]; None: none.
          hidden: after the last norm [B, T, E].
        """
        size, vocab = tokens.shape[1], self.seen.shape[1]
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        count = jnp.sum(valid, axis=1)
        if size == 1:
            # A comparison instead of a scatter, for which XLA on CPU has a loop.
            seen = self.seen | ((jnp.arange(vocab) == tokens) & valid)
            last = hidden[:, 0]
        else:
            rows = jnp.arange(tokens.shape[0])[:, None]
            seen = self.seen.at[rows, jnp.where(valid, tokens, vocab)].set(True, mode="drop")
            place = jnp.max(jnp.where(valid, jnp.arange(size), 0), axis=1, initial=0)
            last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
        last = jnp.where(count[:, None] > 0, last, self.hidden)
        return DecodingState(stacks, self.length + count, last, seen, self.layout)


def cache_capacity(config: ModelConfig, liza: LizaConfig | None, max_tokens: int) -> int:
    """Slots of layers without a window: a power of two, so that few programs are compiled.

    If every layer has a window, it is the widest, whatever `max_tokens`.
    """
    windows = [softmax_window(config, liza, kind) for kind in set(layer_kinds(config, liza))]
    known = [window for window in windows if window is not None]
    if len(known) == len(windows) or (liza is not None and not liza.softmax):
        return max(known, default=1)
    size = _SMALLEST_CACHE
    while size < max_tokens:
        size *= 2
    return size


# One program, not one for every array: they would take longer than the first token itself.
@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("sizes", "dtypes", "memory"))
def _empty_state(
    config: ModelConfig,
    liza: LizaConfig | None,
    *,
    sizes: tuple[int, int],
    dtypes: tuple[DTypeLike, DTypeLike],
    memory: bool,
) -> DecodingState:
    (batch, max_tokens), (dtype, cache_dtype) = sizes, dtypes
    stacks = init_stack_caches(config, liza, batch=batch, max_tokens=max_tokens, dtype=cache_dtype)
    if not memory:
        stacks = tuple(stack._replace(memory=None) for stack in stacks)
    return DecodingState(
        stacks,
        length=jnp.zeros((batch,), jnp.int32),
        hidden=jnp.zeros((batch, config.embed_dim), dtype),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        layout=StateLayout.of(config, liza, use_memory=memory),
    )


def init_decoding_state(
    config: ModelConfig,
    liza: LizaConfig | None,
    *,
    batch_size: int,
    max_tokens: int,
    dtype: DTypeLike,
    cache_dtype: DTypeLike | None = None,
    use_memory: bool = True,
) -> DecodingState:
    """The state before the first token; `tptt_jax.init_cache` makes that of a model.

    Args:
      config: of the model.
      liza: of its memory; None: the plain base model.
      batch_size: rows B.
      max_tokens: slots of layers without a window.
      dtype: of hidden states.
      cache_dtype: of keys, values and raw tokens; None: `dtype`. Memories are float32.
      use_memory: False leaves the memory out.
    """
    dtype = jnp.dtype(dtype)
    return _empty_state(
        config,
        liza,
        sizes=(batch_size, max_tokens),
        dtypes=(dtype, dtype if cache_dtype is None else jnp.dtype(cache_dtype)),
        memory=use_memory and runs_memory(config, liza),
    )
