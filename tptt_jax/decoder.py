"""A decoder layer, and how a stack of them is scanned."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, Float, Hidden, Int
from tptt_jax.config import (
    LayerKind,
    LizaConfig,
    LoraConfig,
    ModelConfig,
    NormPlacement,
    Remat,
)
from tptt_jax.layers.cache import (
    KeyValueCache,
    MemoryState,
    init_key_value_cache,
    init_memory_state,
)
from tptt_jax.layers.liza import Branches, LayerTokens, LizaAttention, LizaOutput
from tptt_jax.layers.mlp import MLP
from tptt_jax.layers.moe import ExpertsMLP
from tptt_jax.layers.norm import NormLayer, residual_norm
from tptt_jax.layers.softmax_attention import (
    TokenContext,
    apply_softmax,
    extend_cache,
    softmax_settings,
)
from tptt_jax.ops.residuals import saves_marked, saves_products


class StackCache(NamedTuple):
    """What the layers of one stack carry between calls.

    Attributes:
      softmax: one cache per kind of layer, with a leading axis over the layers of that
        kind; None in a purely linear model.
      memory: with a leading axis over all layers; None without a memory.
    """

    softmax: dict[LayerKind, KeyValueCache] | None
    memory: MemoryState | None


class Cache(NamedTuple):
    """What a model carries between calls.

    Attributes:
      stacks: one per stack of layers.
      length: tokens of each row so far [B], int32.
    """

    stacks: tuple[StackCache, ...]
    length: Int[Array, "B"]


def layer_stacks(config: ModelConfig) -> tuple[range, ...]:
    """Runs of consecutive layers of one shape; each is stacked, scanned and compiled once.

    Layers of different kinds (sliding, full) have the same parameters and share a stack.
    """
    runs = itertools.groupby(range(config.num_layers), key=config.layer_sizes)
    layers = [list(run) for _, run in runs]
    return tuple(range(run[0], run[-1] + 1) for run in layers)


def layer_location(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Where a layer's parameters lie: number of the stack, index on its leading axis."""
    for number, layers in enumerate(layer_stacks(config)):
        if layer in layers:
            return number, layers.index(layer)
    raise ValueError(f"the model has {config.num_layers} layers, counted from 0, got {layer}.")


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates one layer; `config` has its sizes (see `ModelConfig.of_layer`)."""

        def norm(*placements: NormPlacement) -> NormLayer | None:
            return residual_norm(config, dtype) if config.norm_placement in placements else None

        self.attn_norm = nnx.data(norm("before", "both"))
        self.self_attn = LizaAttention(config, liza, lora, dtype=dtype, rngs=rngs)
        self.attn_post_norm = nnx.data(norm("after", "both"))
        self.mlp_norm = nnx.data(norm("before", "both"))
        feed_forward = ExpertsMLP if config.num_experts else MLP
        self.mlp = feed_forward(config, lora, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = nnx.data(norm("after", "both"))

    def __call__(
        self, x: Hidden, tokens: LayerTokens, *, dropout_key: Array | None = None, **kwargs: Any
    ) -> tuple[Hidden, LizaOutput]:
        """[B, T, E] -> [B, T, E]; `kwargs` are those of LizaAttention."""
        normal = _apply(self.attn_norm, x)
        attended = self.self_attn(normal, tokens, dropout_key=dropout_key, **kwargs)
        x = x + _apply(self.attn_post_norm, attended.out)
        out = self.mlp(_apply(self.mlp_norm, x), dropout_key)
        return x + _apply(self.mlp_post_norm, out), attended


def _apply(norm: NormLayer | None, x: Hidden) -> Hidden:
    return x if norm is None else norm(x)


REMAT_POLICIES: dict[Remat, Callable | None] = {
    "none": saves_marked,
    "dots": saves_products,
    "full": None,
}


def _rematerialize(body: Callable, remat: Remat) -> Callable:
    """Even "none" keeps only what is dear: to write, clear and read the rest takes longer."""
    return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)


def init_stack_caches(
    config: ModelConfig,
    liza: LizaConfig | None,
    *,
    batch: int,
    max_tokens: int,
    dtype: jnp.dtype,
) -> tuple[StackCache, ...]:
    """The empty caches of all stacks; see `tptt_jax.init_cache`."""

    def stacked(layer: Any, count: int) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), layer)

    stacks = []
    for layers in layer_stacks(config):
        kinds: list[LayerKind] = [config.layer_kinds[i] for i in layers]
        sizes = config.of_layer(layers[0])
        softmax = memory = None
        if liza is None or liza.softmax:
            softmax = {}
            for kind in dict.fromkeys(kinds):
                one = init_key_value_cache(
                    sizes, liza, kind, batch=batch, max_tokens=max_tokens, dtype=dtype
                )
                softmax[kind] = stacked(one, kinds.count(kind))
        if liza is not None:
            heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
            one = init_memory_state(liza, batch, *heads, dtype)
            memory = stacked(one, len(kinds))
        stacks.append(StackCache(softmax, memory))
    return tuple(stacks)


@dataclass(frozen=True, kw_only=True)
class StackRun:
    """One call of one stack: a scan over its layers.

    Layers of different kinds share everything but softmax attention, so only that is
    compiled once per kind, and chosen by a switch inside the scan.

    Attributes:
      config: sizes of these layers.
      liza: the memory; None: none.
      kinds: of the layers, in order.
      contexts: of the tokens, by kind.
      share: the memory's share if it is scheduled.
      use_memory: False leaves the memory out.
      return_branches: whether both attention branches are returned.
      remat: what the backward pass computes again.
    """

    config: ModelConfig
    liza: LizaConfig | None
    kinds: tuple[LayerKind, ...]
    contexts: dict[LayerKind, TokenContext]
    share: Float[Array, ""] | None
    use_memory: bool
    return_branches: bool
    remat: Remat

    def __post_init__(self) -> None:
        """Rejects a remat that is no choice."""
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat must be one of none, dots, full, got {self.remat!r}.")

    def __call__(
        self,
        layers: DecoderLayer | nnx.List,
        x: Hidden,
        *,
        cache: StackCache | None,
        dropout_key: Array | None,
    ) -> tuple[Hidden, StackCache | None, Branches | None]:
        """Runs every layer.

        Args:
          layers: one module whose parameters have a leading axis of layers, or an nnx.List
            with a module for each layer.
          x: [B, T, E].
          cache: of this stack, or None.
          dropout_key: turns dropout on.

        Returns:
          [B, T, E]; the new cache; both branches with a leading axis of layers.
        """
        if isinstance(layers, nnx.List):
            return self._run_unstacked(layers, x, cache)
        graphdef, parameters = nnx.split(layers)
        count = len(self.kinds)
        kinds = tuple(dict.fromkeys(self.kinds))
        kind_number = jnp.array([kinds.index(kind) for kind in self.kinds])
        # The how-maniest layer of its kind: where its softmax cache lies.
        rank = jnp.array([self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)])
        keys = None if dropout_key is None else jax.random.split(dropout_key, count)
        memory = None if cache is None else cache.memory

        def body(x: Hidden, inputs: tuple) -> tuple[Hidden, tuple]:
            parameters, kind_number, rank, key, memory = inputs
            x, attended = nnx.merge(graphdef, parameters)(
                x,
                self._layer_tokens(kinds, kind_number, rank, cache),
                memory_state=memory,
                use_memory=self.use_memory,
                dropout_key=key,
            )
            new = None if cache is None else (attended.keys, attended.values, attended.memory)
            return x, (new, attended.branches if self.return_branches else None)

        inputs = (parameters, kind_number, rank, keys, memory)
        # With a cache nobody asks for a gradient.
        run = body if cache is not None else _rematerialize(body, self.remat)
        x, (new, branches) = lax.scan(run, x, inputs)
        return x, None if cache is None else self._extend(cache, *new), branches

    def _run_unstacked(
        self, layers: nnx.List, x: Hidden, cache: StackCache | None
    ) -> tuple[Hidden, StackCache | None, Branches | None]:
        """The same layers as modules of their own, see `tptt_jax.inference.unstack`."""
        new, branches = [], []
        for i, (layer, kind) in enumerate(zip(layers, self.kinds, strict=True)):
            rank = jnp.asarray(self.kinds[:i].count(kind))
            memory = None if cache is None else jax.tree.map(lambda m, i=i: m[i], cache.memory)
            x, attended = layer(
                x,
                self._layer_tokens((kind,), jnp.asarray(0), rank, cache),
                memory_state=memory,
                use_memory=self.use_memory,
            )
            new.append((attended.keys, attended.values, attended.memory))
            branches.append(attended.branches)
        keys, values, memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)
        joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *branches)
        new_cache = None
        if cache is not None:
            # What is written must depend on the last layer's result: XLA then sees that every
            # cache has been read before, and writes in place instead of copying it.
            spoiled = jnp.isnan(x[..., :1, None])
            keys, values = (
                y if y is None else jnp.where(spoiled, jnp.nan, y) for y in (keys, values)
            )
            new_cache = self._extend(cache, keys, values, memory)
        return x, new_cache, joined if self.return_branches else None

    def _layer_tokens(
        self,
        kinds: tuple[LayerKind, ...],
        kind_number: Int[Array, ""],
        rank: Int[Array, ""],
        cache: StackCache | None,
    ) -> LayerTokens:
        def attend(kind: LayerKind, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            settings = softmax_settings(self.config, self.liza, kind)
            mine = None
            if cache is not None:
                assert cache.softmax is not None
                mine = jax.tree.map(lambda x: x[rank], cache.softmax[kind])
            return apply_softmax(settings, self.contexts[kind], q, k, v, mine)

        def softmax(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            options = [functools.partial(attend, kind) for kind in kinds]
            if len(options) == 1:
                return options[0](q, k, v)
            return lax.switch(kind_number, options, q, k, v)

        any_context = self.contexts[kinds[0]]
        return LayerTokens(softmax, any_context.segment_ids, any_context.length, self.share)

    def _extend(
        self,
        cache: StackCache,
        keys: Array | None,
        values: Array | None,
        memory: MemoryState | None,
    ) -> StackCache:
        """Writes the tokens of a call into the caches of all layers of each kind at once."""
        if cache.softmax is None:
            return StackCache(None, memory)
        assert keys is not None
        assert values is not None
        softmax = {}
        for kind, old in cache.softmax.items():
            mine = jnp.array([i for i, other in enumerate(self.kinds) if other == kind])
            write = functools.partial(extend_cache, self.contexts[kind])
            softmax[kind] = jax.vmap(write)(old, keys[mine], values[mine])
        return StackCache(softmax, memory)
