"""A stack: consecutive layers of one shape, scanned or one by one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float, Hidden, Int
from tptt_jax.config import LayerKind, LizaConfig, LoraConfig, ModelConfig, Remat
from tptt_jax.decoder.layer import DecoderLayer
from tptt_jax.decoder.stack_cache import StackCache, extend_stack_cache
from tptt_jax.decoder.stacked import (
    Split,
    init_stacked,
    split_layers,
    spread_memory,
    stack_trees,
)
from tptt_jax.layers.cache import KeyValueCache, MemoryState
from tptt_jax.layers.liza import Branches, LayerTokens, LizaOutput
from tptt_jax.layers.parameters import MemoryParam
from tptt_jax.layers.softmax_attention import TokenContext
from tptt_jax.ops.residuals import saves_marked, saves_products

REMAT_POLICIES: dict[Remat, Callable | None] = {
    "none": saves_marked,
    "dots": saves_products,
    "full": None,
}


class StackOutput(NamedTuple):
    """The result of a call of a stack.

    Attributes:
      hidden: [B, T, E].
      cache: the new cache; None without one.
      branches: both attention branches with a leading axis of layers; None unless requested.
    """

    hidden: Hidden
    cache: StackCache | None
    branches: Branches | None


class _Call(NamedTuple):
    """The arguments of one call; see `Stack.__call__`."""

    contexts: dict[LayerKind, TokenContext]
    share: Float[Array, ""] | None
    cache: StackCache | None
    use_memory: bool
    return_branches: bool
    remat: Remat
    keys: Array | None  # of dropout, one for each layer

    @property
    def softmax(self) -> dict[LayerKind, KeyValueCache] | None:
        """The softmax caches."""
        return None if self.cache is None else self.cache.softmax

    @property
    def memory(self) -> MemoryState | None:
        """The memory states, with a leading axis over the layers whose memory runs."""
        return None if self.cache is None else self.cache.memory


class Stack(nnx.Module):
    """Consecutive layers of one shape.

    The stack has the parts of one `DecoderLayer`. Their parameters have a leading axis over the
    layers, those of the memory one over the layers that have a memory, and `lax.scan` runs the
    layers. Layers of different kinds share everything but softmax attention, so only that is
    compiled once per kind, and chosen by a switch inside the scan.

    `unroll` gives the same stack with a module for each layer: `layers` holds them, and the other
    parts are None.

    Attributes:
      kinds: of the layers, in order.
      has_memory: whether each layer has a memory.
      runs_memory: whether each layer's memory ever holds tokens.
      layers: one module for each layer once unrolled; None: they are scanned.
    """

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        kinds: tuple[LayerKind, ...],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights.

        Args:
          config: sizes of these layers (see `ModelConfig.of_layer`).
          liza: the memory; None: none.
          lora: adapters; None: none.
          kinds: of the layers, in order.
          dtype: of the base weights.
          rngs: its stream "params" is used.
        """
        self.kinds = kinds
        self.has_memory = tuple(liza is not None and liza.has_memory(kind) for kind in kinds)
        self.runs_memory = tuple(liza is not None and liza.runs_memory(kind) for kind in kinds)
        self.layers = nnx.data(None)

        def make_layer(key: Array) -> DecoderLayer:
            return DecoderLayer.create(
                config,
                liza,
                lora,
                with_memory=any(self.has_memory),
                dtype=dtype,
                rngs=nnx.Rngs(key),
            )

        stacked = init_stacked(make_layer, self.has_memory, rngs)
        self.attn_norm = nnx.data(stacked.attn_norm)
        self.self_attn = stacked.self_attn
        self.attn_post_norm = nnx.data(stacked.attn_post_norm)
        self.mlp_norm = nnx.data(stacked.mlp_norm)
        self.mlp = stacked.mlp
        self.mlp_post_norm = nnx.data(stacked.mlp_post_norm)

    def __call__(
        self,
        x: Hidden,
        contexts: dict[LayerKind, TokenContext],
        *,
        share: Float[Array, ""] | None = None,
        cache: StackCache | None = None,
        use_memory: bool = True,
        return_branches: bool = False,
        remat: Remat = "none",
        dropout_key: Array | None = None,
    ) -> StackOutput:
        """Runs every layer.

        Args:
          x: [B, T, E].
          contexts: of the tokens, for layers of each kind.
          share: the memory's share if it is scheduled.
          cache: of this stack; None: rows start with this call.
          use_memory: False leaves the memory out.
          return_branches: whether both attention branches are returned.
          remat: what the backward pass recomputes.
          dropout_key: turns dropout on.

        Raises:
          ValueError: if remat is no choice.
        """
        if remat not in get_args(Remat):
            raise ValueError(f"remat must be one of none, dots, full, got {remat!r}.")
        keys = None if dropout_key is None else jax.random.split(dropout_key, len(self.kinds))
        call = _Call(contexts, share, cache, use_memory, return_branches, remat, keys)
        return self._run_scanned(x, call) if self.layers is None else self._run_unrolled(x, call)

    def scan(
        self,
        body: Callable[[DecoderLayer, Hidden, Any], tuple[Hidden, Any]],
        x: Hidden,
        inputs: Any,
        remat: Remat | None = None,
    ) -> tuple[Hidden, Any]:
        """Runs a function of each layer in turn, in one `lax.scan`.

        Args:
          body: layer, [B, T, E] and the layer's inputs to [B, T, E] and outputs. Where only some
            layers have a memory, those without one are given another's and must not use it.
          x: [B, T, E].
          inputs: arrays with a leading axis of layers.
          remat: what the backward pass recomputes; None: nothing.

        Returns:
          [B, T, E], and the outputs with a leading axis of layers.
        """
        assert self.layers is None, "the layers are unrolled"
        graphdef, of_memory, parameters = nnx.split(self._stacked(), MemoryParam, ...)

        def step(x: Hidden, of_layer: tuple) -> tuple[Hidden, Any]:
            parameters, of_memory, inputs = of_layer
            return body(nnx.merge(graphdef, of_memory, parameters), x, inputs)

        run = step if remat is None else _rematerialize(step, remat)
        return lax.scan(run, x, (parameters, spread_memory(of_memory, self.has_memory), inputs))

    @property
    def kind_numbers(self) -> tuple[tuple[LayerKind, ...], Int[Array, "L"]]:
        """The different kinds of layers, and the index of each layer's kind among them."""
        different = tuple(dict.fromkeys(self.kinds))
        return different, jnp.array([different.index(kind) for kind in self.kinds])

    def unroll(self, split: Split = list) -> "Stack":
        """The same stack with a module for each layer; this one is not changed.

        Args:
          split: cuts an array into the entries of its first axis.
        """
        unrolled = nnx.merge(*nnx.split(self))
        for name in nnx.state(self):
            setattr(unrolled, str(name), nnx.data(None))
        unrolled.layers = nnx.List(split_layers(self._stacked(), self.has_memory, split))
        return unrolled

    def _run_scanned(self, x: Hidden, call: _Call) -> StackOutput:
        different, numbers = self.kind_numbers

        def body(layer: DecoderLayer, x: Hidden, inputs: tuple) -> tuple[Hidden, tuple]:
            (number, rank), key, memory = inputs
            tokens = LayerTokens(call.contexts, different, number, call.softmax, rank, call.share)
            x, attended = _run_layer(x, layer, tokens, call, memory, key)
            new = None
            if call.cache is not None:
                new = (attended.keys, attended.values, attended.memory)
            return x, (new, attended.branches if call.return_branches else None)

        places = (numbers, jnp.array(self._ranks))
        inputs = (places, call.keys, spread_memory(call.memory, self.runs_memory))
        # Calls with a cache are never differentiated.
        remat = call.remat if call.cache is None else None
        x, (new, branches) = self.scan(body, x, inputs, remat)
        if call.cache is None:
            return StackOutput(x, None, branches)
        keys, values, memory = new
        if call.memory is not None and not all(self.runs_memory):
            memory = jax.tree.map(lambda m: m[np.flatnonzero(self.runs_memory)], memory)
        cache = extend_stack_cache(self.kinds, call.contexts, call.cache, keys, values, memory)
        return StackOutput(x, cache, branches)

    def _run_unrolled(self, x: Hidden, call: _Call) -> StackOutput:
        assert self.layers is not None
        outputs: list[LizaOutput] = []
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            rank, number = self._ranks[i], sum(self.runs_memory[:i])
            run = functools.partial(
                _run_layer,
                layer=layer,
                tokens=LayerTokens(call.contexts, (kind,), None, call.softmax, rank, call.share),
                call=call,
                memory=_entry(call.memory, number) if self.runs_memory[i] else None,
                key=_entry(call.keys, i),
            )
            if call.cache is None:
                run = _rematerialize(run, call.remat)
            x, attended = run(x)
            outputs.append(attended)
        branches = _stack_branches(outputs) if call.return_branches else None
        if call.cache is None:
            return StackOutput(x, None, branches)
        written = stack_trees([(y.keys, y.values) for y in outputs])
        running = zip(outputs, self.runs_memory, strict=True)
        memory = stack_trees([y.memory for y, runs in running if runs])
        keys, values = _after(x, written)
        cache = extend_stack_cache(self.kinds, call.contexts, call.cache, keys, values, memory)
        return StackOutput(x, cache, branches)

    @property
    def _ranks(self) -> list[int]:
        """Index of each layer among the layers of the same kind: where its softmax cache lies."""
        return [self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)]

    def _stacked(self) -> DecoderLayer:
        """The parts as one layer, whose parameters have a leading axis."""
        return DecoderLayer(
            self.self_attn,
            self.mlp,
            attn_norm=self.attn_norm,
            attn_post_norm=self.attn_post_norm,
            mlp_norm=self.mlp_norm,
            mlp_post_norm=self.mlp_post_norm,
        )


def _run_layer(
    x: Hidden,
    layer: DecoderLayer,
    tokens: LayerTokens,
    call: _Call,
    memory: MemoryState | None,
    key: Array | None,
) -> tuple[Hidden, LizaOutput]:
    return layer(x, tokens, memory_state=memory, use_memory=call.use_memory, dropout_key=key)


def _rematerialize(body: Callable, remat: Remat) -> Callable:
    """Even "none" saves only expensive intermediates: writing and reading the rest takes longer."""
    return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)


def _entry(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack_branches(outputs: list[LizaOutput]) -> Branches:
    """The branches of separate layers; zero where a layer among others has no memory."""
    found = [y.branches for y in outputs]
    if any(each.linear is not None for each in found):
        found = [
            each._replace(linear=jnp.zeros_like(each.softmax)) if each.linear is None else each
            for each in found
        ]
    return stack_trees(found)


def _after(x: Hidden, written: Any) -> Any:
    """Arrays [L, B, T, K, D] as they are, but made to depend on the result of the last layer.

    XLA then sees that every cache has been read before it is written, and writes in place instead
    of copying it. A barrier does not do that: XLA removes barriers before it decides about copies.
    """
    is_nan = jnp.isnan(x[..., :1, None])
    return jax.tree.map(lambda y: jnp.where(is_nan, jnp.nan, y), written)
