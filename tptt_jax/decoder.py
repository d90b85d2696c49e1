"""A decoder layer, and how a stack of them is scanned."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
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
    layer_kinds,
    memory_layers,
)
from tptt_jax.layers.cache import (
    KeyValueCache,
    MemoryState,
    init_key_value_cache,
    init_memory_state,
)
from tptt_jax.layers.cache_checks import check_equal, check_ring
from tptt_jax.layers.liza import Branches, LayerTokens, LizaAttention, LizaOutput
from tptt_jax.layers.mlp import MLP
from tptt_jax.layers.moe import ExpertsMLP
from tptt_jax.layers.norm import NormLayer, residual_norm
from tptt_jax.layers.parameters import MemoryParam
from tptt_jax.layers.softmax_attention import (
    TokenContext,
    extend_cache,
)
from tptt_jax.ops.residuals import saves_marked, saves_products


class StackCache(NamedTuple):
    """The state of one stack's layers between calls.

    Attributes:
      softmax: one cache per kind of layer, with a leading axis over the layers of that
        kind; None in a purely linear model.
      memory: with a leading axis over the layers whose memory runs; None without any.
    """

    softmax: dict[LayerKind, KeyValueCache] | None
    memory: MemoryState | None


class Cache(NamedTuple):
    """The state of a model between calls.

    Attributes:
      stacks: one per stack of layers.
      length: tokens of each row so far [B], int32.
    """

    stacks: tuple[StackCache, ...]
    length: Int[Array, "B"]


def layer_stacks(config: ModelConfig) -> tuple[range, ...]:
    """Runs of consecutive layers of one shape; each is stacked, scanned and compiled once.

    Layers of different kinds (sliding, full, kept) have the same parameters and share a stack.
    """
    runs = itertools.groupby(range(config.num_layers), key=config.layer_sizes)
    layers = [list(run) for _, run in runs]
    return tuple(range(run[0], run[-1] + 1) for run in layers)


def layer_location(config: ModelConfig, layer: int) -> tuple[int, int]:
    """The place of a layer's parameters: number of the stack, index on its leading axis."""
    for number, layers in enumerate(layer_stacks(config)):
        if layer in layers:
            return number, layers.index(layer)
    raise ValueError(f"the model has {config.num_layers} layers, counted from 0, got {layer}.")


def memory_location(
    config: ModelConfig, liza: LizaConfig | None, layer: int
) -> tuple[int, int] | None:
    """The place of a layer's memory parameters, as `layer_location`; None without a memory.

    Their leading axis counts only the layers of the stack that have a memory.
    """
    number, _ = layer_location(config, layer)
    mine = stack_memory(config, liza, layer_stacks(config)[number])
    return (number, mine.index(layer)) if layer in mine else None


def stack_memory(
    config: ModelConfig, liza: LizaConfig | None, layers: Sequence[int]
) -> tuple[int, ...]:
    """Those of some layers that have a memory."""
    with_memory = set(memory_layers(config, liza))
    return tuple(layer for layer in layers if layer in with_memory)


def is_memory(path: tuple[Any, ...]) -> bool:
    """Whether a path leads to a parameter of the memory; with a variable see `MemoryParam`."""
    return "memory" in path or "mag" in path


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        *,
        with_memory: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates one layer; `config` has its sizes (see `ModelConfig.of_layer`)."""

        def norm(*placements: NormPlacement) -> NormLayer | None:
            return residual_norm(config, dtype) if config.norm_placement in placements else None

        self.attn_norm = nnx.data(norm("before", "both"))
        self.self_attn = LizaAttention(
            config, liza, lora, with_memory=with_memory, dtype=dtype, rngs=rngs
        )
        self.attn_post_norm = nnx.data(norm("after", "both"))
        self.mlp_norm = nnx.data(norm("before", "both"))
        feed_forward = ExpertsMLP if config.num_experts else MLP
        self.mlp = feed_forward(config, lora, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = nnx.data(norm("after", "both"))

    def __call__(
        self,
        x: Hidden,
        tokens: LayerTokens,
        *,
        memory_state: MemoryState | None = None,
        use_memory: bool = True,
        dropout_key: Array | None = None,
    ) -> tuple[Hidden, LizaOutput]:
        """[B, T, E] -> [B, T, E]; arguments as those of `LizaAttention`."""
        attended = self.self_attn(
            apply_norm(self.attn_norm, x),
            tokens,
            memory_state=memory_state,
            use_memory=use_memory,
            dropout_key=dropout_key,
        )
        return self.add(x, attended.out, dropout_key), attended

    def add(self, x: Hidden, attended: Hidden, dropout_key: Array | None = None) -> Hidden:
        """Adds the attention output, then the MLP's output, to the residual stream."""
        x = x + apply_norm(self.attn_post_norm, attended)
        out = self.mlp(apply_norm(self.mlp_norm, x), dropout_key)
        return x + apply_norm(self.mlp_post_norm, out)


def apply_norm(norm: NormLayer | None, x: Hidden) -> Hidden:
    """Applies a norm; None returns x."""
    return x if norm is None else norm(x)


REMAT_POLICIES: dict[Remat, Callable | None] = {
    "none": saves_marked,
    "dots": saves_products,
    "full": None,
}


def _rematerialize(body: Callable, remat: Remat) -> Callable:
    """Even "none" saves only expensive intermediates: writing and reading the rest takes longer."""
    return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)


def init_stack(
    config: ModelConfig,
    liza: LizaConfig | None,
    lora: LoraConfig | None,
    layers: range,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> DecoderLayer:
    """A module whose parameters have a leading axis over some layers of one shape.

    Parameters of the memory have one over the layers of the stack that have a memory.
    """
    with_memory = stack_memory(config, liza, layers)
    sizes = config.of_layer(layers[0])

    def make_layer(key: Array) -> DecoderLayer:
        return DecoderLayer(
            *(sizes, liza, lora),
            with_memory=bool(with_memory),
            dtype=dtype,
            rngs=nnx.Rngs(key),
        )

    keys = jax.random.split(rngs.params(), len(layers))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_layer(keys[0])))
    state = jax.vmap(lambda key: nnx.state(make_layer(key)))(keys)
    of_memory, others = nnx.split_state(state, MemoryParam, ...)
    places = np.array([layers.index(layer) for layer in with_memory], int)
    of_memory = jax.tree.map(lambda x: x[places], of_memory)
    return nnx.merge(graphdef, of_memory, others)


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

    stacks, of_layers = [], layer_kinds(config, liza)
    for layers in layer_stacks(config):
        kinds: list[LayerKind] = [of_layers[i] for i in layers]
        sizes = config.of_layer(layers[0])
        softmax = memory = None
        if liza is None or liza.softmax:
            softmax = {}
            for kind in dict.fromkeys(kinds):
                one = init_key_value_cache(
                    sizes, liza, kind, batch=batch, max_tokens=max_tokens, dtype=dtype
                )
                softmax[kind] = stacked(one, kinds.count(kind))
        running = 0 if liza is None else sum(map(liza.runs_memory, kinds))
        if liza is not None and running:
            heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
            one = init_memory_state(liza, batch, *heads, dtype)
            memory = stacked(one, running)
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
      remat: what the backward pass recomputes.
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
        """Rejects an unknown remat."""
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
        graphdef, of_memory, parameters = nnx.split(layers, MemoryParam, ...)
        kinds = tuple(dict.fromkeys(self.kinds))
        kind_number = jnp.array([kinds.index(kind) for kind in self.kinds])
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, len(self.kinds))

        def body(x: Hidden, inputs: tuple) -> tuple[Hidden, tuple]:
            (parameters, of_memory), (kind_number, rank), key, memory = inputs
            x, attended = nnx.merge(graphdef, of_memory, parameters)(
                x,
                LayerTokens(self.contexts, kinds, kind_number, _softmax(cache), rank, self.share),
                memory_state=memory,
                use_memory=self.use_memory,
                dropout_key=key,
            )
            new = None if cache is None else (attended.keys, attended.values, attended.memory)
            return x, (new, attended.branches if self.return_branches else None)

        has, runs = self._flags("has_memory"), self._flags("runs_memory")
        inputs = (
            (parameters, spread_memory(of_memory, has)),
            (kind_number, jnp.array(self._ranks)),
            keys,
            None if cache is None else spread_memory(cache.memory, runs),
        )
        # Calls with a cache are never differentiated.
        run = body if cache is not None else _rematerialize(body, self.remat)
        x, (new, branches) = lax.scan(run, x, inputs)
        if cache is None:
            return x, None, branches
        keys, values, memory = new
        if cache.memory is not None and not all(runs):
            memory = jax.tree.map(lambda m: m[np.flatnonzero(runs)], memory)
        return x, self._extend(cache, keys, values, memory), branches

    def _flags(self, name: str) -> list[bool]:
        """Whether each layer has, or runs, a memory."""
        return [self.liza is not None and getattr(self.liza, name)(kind) for kind in self.kinds]

    @property
    def _ranks(self) -> list[int]:
        """Index of each layer among the layers of the same kind: where its softmax cache lies."""
        return [self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)]

    def _run_unstacked(
        self, layers: nnx.List, x: Hidden, cache: StackCache | None
    ) -> tuple[Hidden, StackCache | None, Branches | None]:
        """The same layers as separate modules, see `tptt_jax.inference.unstack`."""
        new, branches, memories = [], [], []
        runs = self._flags("runs_memory")
        for i, (layer, kind) in enumerate(zip(layers, self.kinds, strict=True)):
            state = None
            if cache is not None and runs[i]:
                index = sum(runs[:i])
                state = jax.tree.map(lambda m, index=index: m[index], cache.memory)
            x, attended = layer(
                x,
                LayerTokens(
                    self.contexts, (kind,), None, _softmax(cache), self._ranks[i], self.share
                ),
                memory_state=state,
                use_memory=self.use_memory,
            )
            new.append((attended.keys, attended.values))
            branches.append(attended.branches)
            if runs[i]:
                memories.append(attended.memory)
        keys, values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)
        memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *memories) if memories else None
        new_cache = None
        if cache is not None:
            # What is written must depend on the last layer's result: XLA then sees that every
            # cache has been read before, and writes in place instead of copying it.
            spoiled = jnp.isnan(x[..., :1, None])
            keys, values = (
                y if y is None else jnp.where(spoiled, jnp.nan, y) for y in (keys, values)
            )
            new_cache = self._extend(cache, keys, values, memory)
        if not self.return_branches:
            return x, new_cache, None
        return x, new_cache, jax.tree.map(lambda *leaves: jnp.stack(leaves), *branches)

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


def check_cache(config: ModelConfig, liza: LizaConfig | None, cache: Cache) -> None:
    """Raises ValueError unless a cache fits these layers and their windows."""
    stacks, of_layers = layer_stacks(config), layer_kinds(config, liza)
    check_equal("stacks of layers", len(cache.stacks), len(stacks))
    for layers, stack in zip(stacks, cache.stacks, strict=True):
        kinds = {of_layers[i] for i in layers}
        if stack.softmax is not None:
            check_equal("kinds of layers", sorted(stack.softmax), sorted(kinds))
        for kind, ring in (stack.softmax or {}).items():
            check_ring(config, liza, kind, ring)


def _softmax(cache: StackCache | None) -> dict[LayerKind, KeyValueCache] | None:
    return None if cache is None else cache.softmax


def spread_memory(tree: Any, flags: Sequence[bool]) -> Any:
    """Gives every layer its own entry; layers without one get another's and must not read it.

    Args:
      tree: arrays with a leading axis over the layers whose flag is set, or None.
      flags: one for each layer.
    """
    if tree is None or all(flags) or not any(flags):
        return tree
    index = np.maximum(np.cumsum(flags) - 1, 0)
    return jax.tree.map(lambda x: x[index], tree)
