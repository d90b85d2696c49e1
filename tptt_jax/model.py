"""The decoder: embeddings, scanned stacks of layers, the LM head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tptt_jax.array_typing import Array, Float, Hidden, Int, Positions, SegmentIds, Tokens
from tptt_jax.config import LayerKind, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.layers.cache import LayerCache, init_layer_cache
from tptt_jax.layers.liza import Branches, LizaAttention
from tptt_jax.layers.lora import Projection
from tptt_jax.layers.mlp import GatedMLP
from tptt_jax.layers.norm import RMSNorm
from tptt_jax.layers.softmax_attention import TokenContext, token_context


class MagShare(nnx.Variable):
    """The memory's share mu when it is scheduled: state, not a parameter."""


class Cache(NamedTuple):
    """What a model carries between calls.

    Attributes:
      layers: one LayerCache per slot of each stack, with a leading axis of repeats.
      length: tokens of each row so far [B], int32.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    length: Int[Array, "B"]


class CausalLMOutput(NamedTuple):
    """What a call of the model returns.

    Attributes:
      logits: [B, T, V].
      hidden: after the last norm [B, T, E].
      cache: the new cache if one was given.
      branches: both attention branches of every layer if asked for, laid out as
        `Cache.layers`.
    """

    logits: Float[Array, "B T V"]
    hidden: Hidden
    cache: Cache | None
    branches: tuple[tuple[Branches, ...], ...] | None


class LayerStack(NamedTuple):
    """`repeats` times the same pattern of layers; scanned over, so compiled once."""

    kinds: tuple[LayerKind, ...]
    repeats: int


def layer_stacks(config: ModelConfig) -> tuple[LayerStack, ...]:
    """Splits the layers into the shortest repeating pattern and what is left of it."""
    kinds = config.layer_kinds
    for period in range(1, len(kinds) + 1):
        repeats = len(kinds) // period
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            break
    stacks = (LayerStack(kinds[:period], repeats),)
    if rest := kinds[period * repeats :]:
        same = len(set(rest)) == 1
        stacks += (LayerStack(rest[:1], len(rest)) if same else LayerStack(rest, 1),)
    return stacks


def layer_location(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Where a layer's parameters lie: (stack, slot in its pattern, index on the leading axis)."""
    for number, stack in enumerate(layer_stacks(config)):
        size = len(stack.kinds) * stack.repeats
        if layer < size:
            return number, layer % len(stack.kinds), layer // len(stack.kinds)
        layer -= size
    raise ValueError(f"the model has {config.num_layers} layers, counted from 0.")


class Embedding(nnx.Module):
    """Token embeddings, which a tied head shares."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Creates the table [V, E] in `dtype`."""
        shape = (config.vocab_size, config.embed_dim)
        table = jax.random.normal(rngs.params(), shape, jnp.float32) * config.embed_dim**-0.5
        self.embedding = nnx.Param(table.astype(dtype), axes=("vocab", "embed"))
        self.scale = config.embed_dim**0.5 if config.scale_embeddings else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens: Tokens) -> Hidden:
        """[B, T] -> [B, T, E] in the model's dtype."""
        x = self.embedding[...][tokens].astype(self.dtype)
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None,
        lora: LoraConfig | None,
        kind: LayerKind,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates one layer of the given kind."""
        self.kind = kind

        def norm() -> RMSNorm:
            return RMSNorm(
                config.embed_dim, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype
            )

        self.attn_norm = norm()
        self.self_attn = LizaAttention(config, liza, lora, kind, dtype=dtype, rngs=rngs)
        self.attn_post_norm = nnx.data(norm() if config.sandwich_norm else None)
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config, lora, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = nnx.data(norm() if config.sandwich_norm else None)

    def __call__(
        self, x: Hidden, context: TokenContext, *, dropout_key: Array | None = None, **kwargs: Any
    ) -> tuple[Hidden, LayerCache | None, Branches]:
        """[B, T, E] -> [B, T, E]; `kwargs` are those of LizaAttention."""
        out, cache, branches = self.self_attn(
            self.attn_norm(x), context, dropout_key=dropout_key, **kwargs
        )
        x = x + (out if self.attn_post_norm is None else self.attn_post_norm(out))
        out = self.mlp(self.mlp_norm(x), dropout_key)
        x = x + (out if self.mlp_post_norm is None else self.mlp_post_norm(out))
        return x, cache, branches


class Stack(nnx.Module):
    """The layers of one LayerStack; every parameter has a leading axis of repeats."""

    def __init__(self, layers: list[DecoderLayer], repeats: int) -> None:
        """Takes ownership of layers whose parameters are stacked already."""
        self.layers = nnx.List(layers)
        self.repeats = repeats


class CausalLM(nnx.Module):
    """A pretrained decoder, and the Titan that `liza` makes of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from tptt_jax import CausalLM, LizaConfig, ModelConfig
      >>> model = CausalLM(ModelConfig.tiny(), LizaConfig(), rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 5), jnp.int32)).logits.shape
      (2, 5, 97)
    """

    def __init__(
        self,
        config: ModelConfig,
        liza: LizaConfig | None = None,
        lora: LoraConfig | None = None,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights.

        Args:
          config: sizes of the base model.
          liza: the memory; None: the plain base model.
          lora: adapters; None: none.
          dtype: of the base weights and of the computation; adapters, shares and
            memory states are float32.
          rngs: its stream "params" is used.

        Raises:
          ValueError: if a LoRA target names no projection.
        """
        self.config, self.liza, self.lora = config, liza, lora
        self.embed = Embedding(config, dtype=dtype, rngs=rngs)

        def make_layers(kinds: tuple[LayerKind, ...], rngs: nnx.Rngs) -> nnx.List:
            return nnx.List(
                [DecoderLayer(config, liza, lora, kind, dtype=dtype, rngs=rngs) for kind in kinds]
            )

        stacks = []
        for stack in layer_stacks(config):
            keys = jax.random.split(rngs.params(), stack.repeats)
            kinds = stack.kinds
            state = jax.vmap(lambda key, kinds=kinds: nnx.state(make_layers(kinds, nnx.Rngs(key))))(
                keys
            )
            abstract = nnx.eval_shape(lambda kinds=kinds: make_layers(kinds, nnx.Rngs(0)))
            layers = nnx.merge(nnx.graphdef(abstract), state)
            stacks.append(Stack(list(layers), stack.repeats))
        self.stacks = nnx.List(stacks)
        if lora is not None:
            lora.check_targets(
                m.path for _, m in nnx.iter_modules(self) if isinstance(m, Projection)
            )
        self.final_norm = RMSNorm(
            config.embed_dim, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype
        )
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            size = (config.embed_dim, config.vocab_size)
            self.lm_head = Projection(
                *size, path="lm_head", axes=("embed", "vocab"), dtype=dtype, rngs=rngs
            )
        self.mag_share = nnx.data(None)
        if liza is not None and liza.mag == "scheduled" and liza.softmax:
            self.mag_share = MagShare(jnp.asarray(liza.mag_init, jnp.float32), axes=())

    @property
    def dtype(self) -> jnp.dtype:
        """Of the hidden states, and of the base weights unless they are trained."""
        return self.embed.dtype

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        cache: Cache | None = None,
        use_memory: bool = True,
        return_branches: bool = False,
        remat: bool = False,
        dropout_key: Array | None = None,
    ) -> CausalLMOutput:
        """Logits of the next token at every place.

        Args:
          tokens: [B, T] int32.
          segment_ids: [B, T]; different documents have different ids, 0 is padding.
            With a cache a row holds one document, and ids only tell padding apart.
          positions: [B, T] within the document; None counts them.
          cache: from `init_cache` or from the call before.
          use_memory: False leaves the memory out; a window stays.
          return_branches: also return both attention branches of every layer.
          remat: recompute layers in the backward pass instead of keeping them.
          dropout_key: turns dropout on.

        Returns:
          Logits [B, T, V] in the model's dtype, and what was asked for. At padding
          they mean nothing.

        Raises:
          ValueError: if the memory is left out of a purely linear model.
        """
        hidden, new_cache, branches = self.forward_hidden(
            tokens,
            segment_ids,
            positions,
            cache=cache,
            use_memory=use_memory,
            return_branches=return_branches,
            remat=remat,
            dropout_key=dropout_key,
        )
        return CausalLMOutput(self.project_logits(hidden), hidden, new_cache, branches)

    def forward_hidden(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        cache: Cache | None = None,
        use_memory: bool = True,
        return_branches: bool = False,
        remat: bool = False,
        dropout_key: Array | None = None,
    ) -> tuple[Hidden, Cache | None, tuple[tuple[Branches, ...], ...] | None]:
        """`__call__` without the LM head: hidden states [B, T, E], cache, branches."""
        if not use_memory and self.liza is not None and not self.liza.softmax:
            raise ValueError("a purely linear model cannot run without its memory.")
        order = None
        length = None if cache is None else cache.length
        if segment_ids is not None and cache is None:
            # Windows count places, so padding must not lie inside a document.
            order = jnp.argsort(segment_ids == 0, axis=1, stable=True)
            tokens, segment_ids = _take(tokens, order), _take(segment_ids, order)
            positions = None if positions is None else _take(positions, order)
        if positions is None:
            positions = count_positions(tokens.shape, segment_ids, length)
        contexts = {
            kind: token_context(self.config, self.liza, kind, positions, segment_ids, length)
            for kind in dict.fromkeys(self.config.layer_kinds)
        }
        x = self.embed(tokens)
        new_layers, branches = [], []
        share = None if self.mag_share is None else self.mag_share[...]
        for number, stack in enumerate(self.stacks):
            x, layer_caches, stack_branches = _scan_stack(
                stack,
                x,
                contexts,
                caches=None if cache is None else cache.layers[number],
                dropout_key=None if dropout_key is None else jax.random.fold_in(dropout_key, number),
                return_branches=return_branches,
                remat=remat,
                share=share,
                use_memory=use_memory,
            )
            new_layers.append(layer_caches)
            branches.append(stack_branches)
        x = self.final_norm(x)
        if order is not None:
            inverse = jnp.argsort(order, axis=1)
            x = _take(x, inverse)
            if return_branches:
                branches = jax.tree.map(
                    lambda b: jax.vmap(_take, (0, None))(b, inverse), branches
                )
        new_cache = None
        if cache is not None:
            valid = tokens.shape[1] if segment_ids is None else jnp.sum(segment_ids != 0, axis=1)
            new_cache = Cache(tuple(new_layers), cache.length + valid)
        return x, new_cache, tuple(branches) if return_branches else None

    def project_logits(self, hidden: Hidden) -> Float[Array, "B T V"]:
        """The LM head: [B, T, E] -> [B, T, V]."""
        if self.lm_head is None:
            logits = hidden @ self.embed.embedding[...].astype(hidden.dtype).T
        else:
            logits = self.lm_head(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def init_cache(
    model: CausalLM, batch_size: int, max_tokens: int, dtype: jnp.dtype | None = None
) -> Cache:
    """The cache before the first token.

    Args:
      model: whose layers it is for.
      batch_size: rows B.
      max_tokens: longest context, in tokens, that layers without a window can hold.
      dtype: of keys, values and raw tokens; None: the model's. Memories are float32.

    Returns:
      The empty cache. Its size does not depend on max_tokens where every layer has
      a window or no softmax.
    """

    def stacked(kind: LayerKind, repeats: int) -> LayerCache:
        layer = init_layer_cache(
            model.config,
            model.liza,
            kind,
            batch=batch_size,
            max_tokens=max_tokens,
            dtype=model.dtype if dtype is None else dtype,
        )
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), layer)

    layers = tuple(
        tuple(stacked(kind, stack.repeats) for kind in stack.kinds)
        for stack in layer_stacks(model.config)
    )
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))


def count_positions(
    shape: tuple[int, ...], segment_ids: SegmentIds | None, length: Int[Array, "B"] | None
) -> Positions:
    """Tokens of the same document before each token [B, T]; padding gets any number."""
    if segment_ids is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return positions if length is None else positions + length[:, None]
    valid = segment_ids != 0
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    if length is not None:
        return jnp.maximum(count, 0) + length[:, None]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = jnp.where(segment_ids != previous, count, 0)
    return jnp.maximum(count - lax.cummax(jnp.maximum(first, 0), axis=1), 0)


def _take(x: Array, order: Int[Array, "B T"]) -> Array:
    index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _scan_stack(
    stack: Stack,
    x: Hidden,
    contexts: dict[LayerKind, TokenContext],
    *,
    caches: tuple[LayerCache, ...] | None,
    dropout_key: Array | None,
    return_branches: bool,
    remat: bool,
    **kwargs: Any,
) -> tuple[Hidden, tuple[LayerCache, ...] | None, tuple[Branches, ...] | None]:
    """Runs the pattern of a stack once per repeat, as one scan."""
    graphdef, state = nnx.split(stack.layers)
    keys = None if dropout_key is None else jax.random.split(dropout_key, stack.repeats)

    def body(x: Hidden, inputs: tuple) -> tuple[Hidden, tuple]:
        state, caches, key = inputs
        new_caches, branches = [], []
        for slot, layer in enumerate(nnx.merge(graphdef, state)):
            x, cache, both = layer(
                x,
                contexts[layer.kind],
                cache=None if caches is None else caches[slot],
                dropout_key=None if key is None else jax.random.fold_in(key, slot),
                **kwargs,
            )
            new_caches.append(cache)
            branches.append(both)
        return x, (
            tuple(new_caches) if caches is not None else None,
            tuple(branches) if return_branches else None,
        )

    body = jax.checkpoint(body) if remat else body
    x, (new_caches, branches) = lax.scan(body, x, (state, caches, keys))
    return x, new_caches, branches
