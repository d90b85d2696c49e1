"""The language model: embeddings, scanned stacks of layers, the LM head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float, Hidden, Int, Positions, SegmentIds, Tokens
from tptt_jax.config import (
    LayerKind,
    LizaConfig,
    LoraConfig,
    ModelConfig,
    Remat,
    check_context_axis,
    layer_kinds,
)
from tptt_jax.decoder import (
    DecodingState,
    Stack,
    cache_capacity,
    check_decoding_state,
    init_decoding_state,
    layer_stacks,
)
from tptt_jax.layers.dropout import choose_dropout_key
from tptt_jax.layers.liza import Branches
from tptt_jax.layers.lora import HEAD, Projection, fold_path
from tptt_jax.layers.norm import residual_norm
from tptt_jax.layers.parameters import BaseParam
from tptt_jax.layers.quantized import QuantizedWeight, StoredWeight, quantize_modules, stored
from tptt_jax.layers.softmax_attention import TokenContext, token_context
from tptt_jax.ops.attention.softcap import apply_softcap
from tptt_jax.ops.context import is_split, num_shards, take_split_tokens
from tptt_jax.ops.documents import count_positions, order_padding, take_places
from tptt_jax.ops.lm_head import head_product
from tptt_jax.ops.placement import constrain, constrain_lookup
from tptt_jax.ops.quantization import TABLE_FORMAT, BaseDtype, Weight, dense
from tptt_jax.token_ids import check_model_tokens


class MagShare(nnx.Variable):
    """The memory's share mu when it is scheduled: state, not a parameter."""


class CausalLMOutput(NamedTuple):
    """The result of a call of the model.

    Attributes:
      logits: [B, T, V].
      hidden: after the last norm [B, T, E].
      cache: the state after the tokens if one was given.
      branches: both attention branches if requested, one entry per stack, with a leading axis of
        layers.
    """

    logits: Float[Array, "B T V"]
    hidden: Hidden
    cache: DecodingState | None
    branches: tuple[Branches, ...] | None


class Embedding(nnx.Module):
    """Token embeddings, which a tied head shares, and learned positions if there are any."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Creates the table [V, E] and, for learned positions, [max_positions, E] in `dtype`."""

        def table(rows: int) -> Array:
            values = jax.random.normal(rngs.params(), (rows, config.embed_dim), jnp.float32)
            return (values * config.embed_dim**-0.5).astype(dtype)

        values = table(config.vocab_size)
        self.embedding: StoredWeight = BaseParam(values, axes=("vocab", "embed"))
        self.positions = nnx.data(None)
        if config.position_embedding == "learned":
            self.positions = BaseParam(table(config.max_positions), axes=("positions", "embed"))
        self.scale = config.embed_dim**0.5 if config.scale_embeddings else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens: Tokens, positions: Positions) -> Hidden:
        """[B, T] -> [B, T, E] in the model's dtype; learned positions end with the last one."""
        rows = jax.tree.map(lambda part: part[tokens], stored(self.embedding))
        x = dense(rows, self.dtype)
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.positions is not None:
            table = self.positions[...].astype(self.dtype)
            x = x + table[jnp.clip(positions, 0, table.shape[0] - 1)]
        return x

    def quantize_weights(self, base_dtype: BaseDtype) -> None:
        """Quantises the table in place; learned positions are few."""
        if isinstance(self.embedding, BaseParam):
            self.embedding = QuantizedWeight(self.embedding, TABLE_FORMAT, axis=-1)


class CausalLM(nnx.Module):
    """A pretrained decoder, or a Titan if `liza` is given.

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
        dtype: DTypeLike = jnp.float32,
        base_dtype: BaseDtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights.

        Args:
          config: sizes of the base model.
          liza: the memory; None: the plain base model.
          lora: adapters; None: none.
          dtype: of the base weights and of the computation; adapters, shares and
            memory states are float32.
          base_dtype: quantises the matrices of the base model, which can then not be trained;
            None: they have `dtype`.
          rngs: its stream "params" is used.

        Raises:
          ValueError: if a LoRA target names no projection.
        """
        self.config, self.liza, self.lora = config, liza, lora
        self.base_dtype: BaseDtype | None = base_dtype
        self.deterministic = True  # train() and eval() change it
        self.embed = Embedding(config, dtype=dtype, rngs=rngs)

        kinds = layer_kinds(config, liza)
        self.stacks = nnx.List(
            Stack(
                config.of_layer(layers[0]),
                liza,
                lora,
                tuple(kinds[i] for i in layers),
                dtype=dtype,
                rngs=rngs,
            )
            for layers in layer_stacks(config)
        )
        if lora is not None:
            lora.check_targets(
                m.path for _, m in nnx.iter_modules(self) if isinstance(m, Projection)
            )
        self.final_norm = residual_norm(config, dtype)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            size = (config.embed_dim, config.vocab_size)
            self.lm_head = Projection(
                *size, path=HEAD, axes=("embed", "vocab"), dtype=dtype, rngs=rngs
            )
        self.mag_share = nnx.data(None)
        if liza is not None and liza.mag == "scheduled" and liza.softmax:
            self.mag_share = MagShare(jnp.asarray(liza.mag_init, jnp.float32), axes=())
        if base_dtype is not None:
            quantize_modules(self, base_dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the hidden states, and of the base weights unless they are trained."""
        return self.embed.dtype

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        cache: DecodingState | None = None,
        use_memory: bool = True,
        window: Int[Array, ""] | None = None,
        return_branches: bool = False,
        remat: Remat = "none",
        rngs: nnx.Rngs | None = None,
        dropout_key: Array | None = None,
    ) -> CausalLMOutput:
        """Logits of the next token at every place.

        Args:
          tokens: [B, T] int32.
          segment_ids: [B, T]; different documents have different ids, 0 is padding.
            With a cache a row holds one document, and ids only tell padding apart.
          positions: [B, T] within the document; None counts them.
          cache: the decoding state, from `init_cache` or from the call before.
          use_memory: False leaves the memory out; a window stays.
          window: a window below the model's own, as a traced scalar: changing it does not
            recompile. Not with a cache.
          return_branches: also return both attention branches of every layer.
          remat: what the backward pass recomputes: "none": only cheap intermediates; "dots":
            everything but products with weights; "full": whole layers.
          rngs: after `model.train()`, its stream "dropout" turns dropout on; ignored with a cache.
          dropout_key: turns dropout on in any mode.

        Returns:
          Logits [B, T, V] in the model's dtype (`project_logits(hidden)` has them in float32), and
          the requested extras. Values at padding are meaningless.

        Raises:
          TypeError: if tokens is not an array.
          ValueError: if tokens are not integers [B, T] or, outside of `jax.jit`, the embedding has
            no row for one, the memory is left out of a purely linear model, a window comes with a
            cache, the cache is of another model, window, dtype or number of rows, remat is no
            choice, dropout is on and has no randomness, or rows cannot be divided along a mesh's
            context axis.
        """
        hidden, new_cache, branches = self.forward_hidden(
            tokens,
            segment_ids,
            positions,
            cache=cache,
            use_memory=use_memory,
            window=window,
            return_branches=return_branches,
            remat=remat,
            rngs=rngs,
            dropout_key=dropout_key,
        )
        logits = self.project_logits(hidden).astype(hidden.dtype)
        return CausalLMOutput(logits, hidden, new_cache, branches)

    def forward_hidden(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        cache: DecodingState | None = None,
        use_memory: bool = True,
        window: Int[Array, ""] | None = None,
        return_branches: bool = False,
        remat: Remat = "none",
        rngs: nnx.Rngs | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Hidden, DecodingState | None, tuple[Branches, ...] | None]:
        """`__call__` without the LM head: hidden states [B, T, E], cache, branches.

        Raises:
          ValueError: as `__call__` does.
        """
        self._check_call(tokens, segment_ids, cache, window, use_memory=use_memory)
        if cache is None:
            dropout_key = self._dropout_key(dropout_key, rngs)
        order = None
        length = None if cache is None else cache.length
        if segment_ids is not None and cache is None:
            # Windows count places, so padding must not lie inside a document.
            order = order_padding(segment_ids)
            tokens, segment_ids = take_places(tokens, order), take_places(segment_ids, order)
            positions = None if positions is None else take_places(positions, order)
        is_plain = positions is None and segment_ids is None and cache is None
        if positions is None:
            positions = count_positions(tokens.shape, segment_ids, length)
        contexts = self._contexts(
            positions,
            segment_ids,
            length,
            window,
            text_length=tokens.shape[1] if is_plain else None,
        )
        x = constrain_lookup(self.embed(tokens, positions))
        stack_caches, branches = [], []
        for number, stack in enumerate(self.stacks):
            output = stack(
                x,
                contexts,
                share=None if self.mag_share is None else self.mag_share[...],
                cache=None if cache is None else cache.stacks[number],
                use_memory=use_memory,
                return_branches=return_branches,
                remat=remat,
                dropout_key=fold_path(dropout_key, f"stacks.{number}"),
            )
            x = output.hidden
            stack_caches.append(output.cache)
            branches.append(output.branches)
        x = self.final_norm(x)
        if order is not None:
            inverse = jnp.argsort(order, axis=1)
            is_divided = is_split(x.shape[1])
            x = take_split_tokens(x, inverse) if is_divided else take_places(x, inverse)
            if return_branches:
                branches = jax.tree.map(
                    lambda b: jax.vmap(take_places, (0, None))(b, inverse), branches
                )
        x = constrain(x, "rows", "tokens", None)
        if cache is not None:
            cache = cache.advance(tuple(stack_caches), tokens, segment_ids, x)
        return x, cache, tuple(branches) if return_branches else None

    def _check_call(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None,
        cache: DecodingState | None,
        window: Int[Array, ""] | None,
        *,
        use_memory: bool,
    ) -> None:
        check_model_tokens(tokens, segment_ids, self.config.vocab_size)
        if not use_memory and self.liza is not None and not self.liza.softmax:
            raise ValueError("a purely linear model cannot run without its memory.")
        if cache is None:
            check_context_axis(self.liza, num_shards(), tokens.shape[1])
            return
        if window is not None:
            raise ValueError("a cache keeps the model's own window: leave window None.")
        check_decoding_state(
            self.config,
            self.liza,
            cache,
            dtype=str(self.dtype),
            rows=tokens.shape[0],
            use_memory=use_memory,
        )

    def _contexts(
        self,
        positions: Positions,
        segment_ids: SegmentIds | None,
        length: Int[Array, "B"] | None,
        window: Int[Array, ""] | None,
        *,
        text_length: int | None,
    ) -> dict[LayerKind, TokenContext]:
        """What attention knows of the tokens, for each kind of layers."""
        place = (positions, segment_ids, length, window)
        return {
            kind: token_context(self.config, self.liza, kind, *place, text_length=text_length)
            for kind in dict.fromkeys(layer_kinds(self.config, self.liza))
        }

    def _dropout_key(self, key: Array | None, rngs: nnx.Rngs | None) -> Array | None:
        rates = tuple(c.dropout for c in (self.lora, self.liza) if c is not None)
        return choose_dropout_key(key, rngs, deterministic=self.deterministic, rates=rates)

    def project_logits(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """The LM head: [..., E] -> [..., V], in at least float32."""
        logits = head_product(hidden, *self.head_matrix())
        if logits.ndim == 3:
            logits = constrain(logits, "rows", "tokens", "vocab")
        return apply_softcap(logits, self.config.final_softcap)

    def head_matrix(self) -> tuple[Weight, int]:
        """The LM head [V, E] or [E, V], tied or not, and which axis is the vocabulary."""
        if self.lm_head is None:
            return stored(self.embed.embedding), 0
        return stored(self.lm_head.kernel), 1


def init_cache(
    model: CausalLM,
    batch_size: int,
    max_tokens: int = 0,
    dtype: DTypeLike | None = None,
    *,
    use_memory: bool = True,
    growable: bool = False,
) -> DecodingState:
    """The decoding state before the first token.

    Args:
      model: whose layers it is for.
      batch_size: rows B.
      max_tokens: slots of layers without a window. They hold this many tokens and then drop the
        oldest. Layers with a window have as many slots as it is wide.
      dtype: of keys, values and raw tokens; None: the model's. Memories are float32.
      use_memory: False leaves the memory out; calls of the model then need use_memory=False, too.
      growable: True rounds max_tokens up (`cache_capacity`), so that few programs are compiled.
        `read` and `generate` start so, and enlarge the state before it is full.

    Returns:
      The empty state. Its size does not depend on max_tokens if every layer has a window or no
      softmax.

    Raises:
      ValueError: if rotary frequencies depend on the length of such long texts (`fix_context`).
    """
    check_context(model.config, max_tokens)
    if growable:
        max_tokens = cache_capacity(model.config, model.liza, max_tokens)
    return init_decoding_state(
        model.config,
        model.liza,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dtype=model.dtype,
        cache_dtype=dtype,
        use_memory=use_memory,
    )


def base_model(model: CausalLM) -> CausalLM:
    """The plain pretrained model inside a Titan, sharing its arrays.

    Adapters, memory and windows are removed; trained weights keep their current values.
    """
    return _rebuild(model, None, None, {})


def fix_context(model: CausalLM, tokens: int) -> CausalLM:
    """The same model with the rotary frequencies of texts of this length.

    "dynamic" and "longrope" scaling choose frequencies by the length of the whole text, which
    changes all earlier keys. A cache cannot do that: to go beyond the trained length with a cache,
    fix the model for the longest text first, as servers do.

    Args:
      model: not changed; arrays are shared.
      tokens: longest text, prompt and new tokens together.

    Returns:
      A model whose frequencies do not depend on the length; `model` itself if they never do.
    """
    if model.config.fixed_up_to is None:
        return model
    fixed = nnx.merge(*nnx.split(model))
    fixed.config = model.config.at_length(tokens)
    return fixed


def check_context(config: ModelConfig, tokens: int) -> None:
    """Raises ValueError if the rotary frequencies change within `tokens` tokens."""
    longest = config.fixed_up_to
    if longest is not None and tokens > longest:
        raise ValueError(
            f"rotary frequencies of this model change beyond {longest} tokens, which a cache of "
            f"{tokens} cannot follow: fix them first, with tptt_jax.fix_context(model, {tokens}), "
            f"or --context {tokens} on the command line."
        )


def replace_memory(
    model: CausalLM, liza: LizaConfig | None, values: dict[str, Array] | None = None
) -> CausalLM:
    """The same model with another memory configuration, sharing its arrays.

    Args:
      model: its adapters stay.
      liza: all its parameters must be in the model or in `values`; None: full softmax attention
        alone.
      values: parameters by dotted path, e.g. "stacks.0.self_attn.mag.logit".

    Raises:
      ValueError: if a parameter is missing, or has another shape.
    """
    rebuilt = _rebuild(model, liza, model.lora, values or {})
    rebuilt.deterministic = model.deterministic
    return rebuilt


def _rebuild(
    model: CausalLM,
    liza: LizaConfig | None,
    lora: LoraConfig | None,
    changes: dict[str, Array],
) -> CausalLM:
    settings: Any = {"dtype": model.dtype, "base_dtype": model.base_dtype}
    abstract = nnx.eval_shape(
        lambda: CausalLM(model.config, liza, lora, **settings, rngs=nnx.Rngs(0))
    )
    known, flat = dict(nnx.to_flat_state(nnx.state(model))), []
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        name = ".".join(map(str, path))
        changed = name in changes
        value = variable.replace(changes[name]) if changed else known.get(path)
        if value is None or value.shape != variable.shape:
            got = "none" if value is None else value.shape
            raise ValueError(f"{name} must have shape {variable.shape}, the model has {got}.")
        flat.append((path, value))
    return nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(flat))
