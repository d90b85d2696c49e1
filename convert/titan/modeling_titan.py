"""A Titan in PyTorch: a pretrained decoder whose attention layers have a linear memory.

This file lies beside the weights it runs and needs torch and transformers only:
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`. One decoder covers every
family; config.json says what it is made of.

Every attention layer makes q, k and v once, and two branches read them (TPTT, arXiv:2506.17671):

    softmax   o_s = softmax(scale q k^T) v        perhaps over a window and the first tokens
    memory    o_m = c S^T q, where each token writes N virtual tokens (k_j, v_j) into the state S:
              S <- exp(g) S,   then for j = 1..N:   S <- S + k_j (beta_j v_j - S^T (beta_j k_j))^T
    mixture   o = (1 - mu) o_s + mu o_m           "Memory as Gate"

Which tokens those are, `liza["writes"]` says. "all": each one as it comes, in every layer. "none":
there is no memory. "evicted": each one as it leaves the window of W tokens, but never the first
ones, which stay visible; layers that the base model windows itself have no memory. At position p
the memory then holds n = p - W - sinks + 1 tokens, and the share mu is 0 until there are any. It is
a constant, or ("mass") an estimate of how much of a full softmax the window has lost:

    mu = sigmoid(w q + a log n + b - log Z),   Z = sum exp(scale q k^T) over window and first tokens

The factor c is 1, or ("learned") exp(u q + c_0). Layers that `liza["full_layers"]` names have
full softmax attention, without a window and a memory.

Axes: B batch, T tokens of a call, S cached tokens, H query heads, K key/value heads, G = H / K,
D head dimension, N virtual tokens of a token, C tokens of a chunk, M = C N, E embedding.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import copy_
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

# What this version of transformers calls it.
CACHE_NAME = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
QUERY_BLOCK = 512
"""Queries of softmax attention handled at a time, so that long prompts fit."""

SETTINGS: dict[str, Any] = {
    "family": None,
    "vocab_size": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    # Where layers differ: one entry per layer, and the name without "_per_layer" is the most.
    "num_heads_per_layer": [],
    "num_kv_heads_per_layer": [],
    "mlp_dim_per_layer": [],
    "activation": "silu",
    "gated_mlp": True,
    "num_experts": 0,
    "experts_per_token": 0,
    "normalize_expert_weights": False,
    "norm": "rms",
    "norm_eps": 1e-6,
    "norm_weight": True,
    "norm_bias": False,
    "norm_offset": False,
    "norm_float32": False,
    "norm_placement": "before",
    "qk_norm": None,
    "clip_qkv": None,
    "fused_qkv": False,
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "query_scale": None,
    "attention_softcap": None,
    "final_softcap": None,
    "scale_embeddings": False,
    "tie_word_embeddings": True,
    "layer_kinds": [],
    "sliding_window": None,
    "position_embedding": "rotary",
    "rope": {"theta": 10_000.0, "scaling": "none"},
    "sliding_rope": None,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "liza": None,
    "use_cache": True,
}
"""Every setting of config.json, as it is if the file does not say."""


class TitanConfig(PreTrainedConfig):
    """What the decoder is made of; `liza` describes its memory, None is the plain base model."""

    model_type = "tptt_titan"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(self, **kwargs: Any) -> None:
        """Takes SETTINGS; everything else goes to transformers."""
        given = {name: kwargs.pop(name, value) for name, value in SETTINGS.items()}
        super().__init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)
        if self.liza is not None:
            # Files from before there was a choice write every token, keep no layer as it was, and
            # have no horizon.
            self.liza = {"writes": "all", "full_layers": [], "horizon": None, **self.liza}

    def layer_size(self, layer: int) -> tuple[int, int, int]:
        """Query heads, key/value heads and MLP width of one layer."""

        def size(sizes: Sequence[int], common: int) -> int:
            return sizes[layer] if sizes else common

        return (
            size(self.num_heads_per_layer, self.num_attention_heads),
            size(self.num_kv_heads_per_layer, self.num_key_value_heads),
            size(self.mlp_dim_per_layer, self.intermediate_size),
        )

    def layer_kind(self, layer: int) -> str:
        """Whether a layer is "full", "sliding", or "kept": full attention without a memory."""
        if self.liza is not None and layer in self.liza["full_layers"]:
            return "kept"
        return self.layer_kinds[layer] if self.layer_kinds else "full"

    def window(self, kind: str) -> int | None:
        """Tokens that softmax attention sees, the current one included; None: all."""
        if kind == "sliding":
            return self.sliding_window
        return None if self.liza is None or kind == "kept" else self.liza["softmax_window"]

    def num_sinks(self, kind: str) -> int:
        """First tokens that stay visible; "sliding" layers were trained without any."""
        if kind == "sliding" or self.window(kind) is None or self.liza is None:
            return 0
        return self.liza["softmax_sinks"]

    def has_memory(self, kind: str) -> bool:
        """Whether layers of this kind have a memory; what the base model windows loses nothing."""
        writes = "none" if self.liza is None else self.liza["writes"]
        return kind != "kept" and (writes == "all" or (writes == "evicted" and kind == "full"))

    def evicts(self, kind: str, tokens: int) -> bool:
        """Whether rows of so many tokens have lost some to a memory of evicted ones."""
        window = self.window(kind)
        is_late = self.liza is not None and self.liza["writes"] == "evicted"
        return is_late and kind == "full" and window is not None and tokens > window


# --- From one call to the next -------------------------------------------------------------------


class LayerCache:
    """What one layer carries: tensors [B, ...] by name.

    keys, values: the last tokens [B, S, K, D], right-aligned; first_keys, first_values: the
    document's first; state [B, K, D, D] and the last written raw_keys, raw_values of the memory.
    """

    is_compileable = is_croppable = is_sliding = supports_early_init = False

    def __init__(self) -> None:
        """Starts empty."""
        self.tensors: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, tokens: int = 0) -> Tensor:
        """The tensor of this name; before the first call, zeros [B, tokens, ...] like another."""
        if name in self.tensors:
            return self.tensors[name]
        return like.new_zeros(like.shape[0], tokens, *like.shape[2:])


class TitanCache(Cache):
    """Keys and values of softmax attention and the memory's states, of every layer.

    Rows may have different lengths; padding is not kept. The size does not grow with the context
    where every layer has a window or no softmax.
    """

    def __init__(self, num_layers: int) -> None:
        """Starts empty."""
        super().__init__(layers=[LayerCache() for _ in range(num_layers)])  # pyright: ignore
        self.length: Tensor | None = None  # tokens of each row [B]
        self.longest = 0
        self.columns = 0  # places of the attention mask, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places of the attention mask so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """There is no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows."""
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.tensors = {name: change(x) for name, x in layer.tensors.items()}  # pyright: ignore
        self.length = None if self.length is None else change(self.length)

    def reset(self) -> None:
        """Empties the cache."""
        self.__init__(len(self.layers))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: what the memory has read cannot be taken back."""
        raise ValueError("a Titan's cache cannot be cropped: its memory cannot unread tokens.")


class Rows(NamedTuple):
    """Where the T tokens of a call stand. In every row the tokens come first, then its padding.

    Attributes:
      length: tokens of each row before this call [B].
      counts: tokens of each row in this call [B].
      tokens: T.
      is_padded: whether a row has fewer than T tokens in this call.
      longest: the most tokens that a row has after this call.
    """

    length: Tensor
    counts: Tensor
    tokens: int
    is_padded: bool
    longest: int

    def positions(self, held: int = 0) -> Tensor:
        """Positions of `held` right-aligned cached tokens and of this call's [B, held + T].

        Below zero there is no token; padding of this call gets what would come next.
        """
        places = torch.arange(-held, self.tokens, device=self.length.device)
        return self.length[:, None] + places

    def valid(self) -> Tensor:
        """False on padding [B, T]."""
        return torch.arange(self.tokens, device=self.counts.device) < self.counts[:, None]

    def last(self, x: Tensor, size: int) -> Tensor:
        """The last `size` tokens, right-aligned, of [B, S + T, ...]: S old ones, then this call's.

        What stands in front of shorter rows has no meaning.
        """
        if not self.is_padded:
            return x[:, x.shape[1] - size :]
        end = x.shape[1] - self.tokens + self.counts
        index = end[:, None] + torch.arange(-size, 0, device=x.device)
        return take(x, index.clamp(min=0))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]]: [B, T, ...] and [B, t] -> [B, t, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


# --- Norms and the rotary embedding --------------------------------------------------------------


def widen(x: Tensor) -> Tensor:
    """X in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """X / sqrt(mean(x^2) + eps) over the last axis, in at least float32."""
    wide = widen(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class TitanNorm(nn.Module):
    """RMS norm or LayerNorm over the last axis.

    The result is cast to x's dtype before it is multiplied by the weight, unless "norm_float32",
    "norm_offset" (a factor of 1 + weight) or a bias ask for float32.
    """

    def __init__(
        self, config: TitanConfig, dim: int, *, kind: str = "rms", weight: bool = True, bias: bool
    ) -> None:
        """Creates weight and bias [dim], if the norm has them."""
        super().__init__()
        self.kind, self.eps, self.offset = kind, config.norm_eps, config.norm_offset
        self.float32 = config.norm_float32 or config.norm_offset or bias
        self.weight = nn.Parameter(torch.empty(dim)) if weight else None
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes it the norm without weights."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in x's dtype."""
        wide = widen(x)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        normal = rms_normalize(wide, self.eps)
        normal = normal if self.float32 else normal.to(x.dtype)
        if self.weight is not None:
            weight = self.weight.to(normal.dtype)
            normal = normal * (1 + weight if self.offset else weight)
        if self.bias is not None:
            normal = normal + self.bias.to(normal.dtype)
        return normal.to(x.dtype)


def rotary_frequencies(rope: dict[str, Any], head_dim: int, device: torch.device) -> Tensor:
    """Radians per token, float64 [D / 2]; "llama3" and "yarn" stretch long wavelengths only."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = rope["theta"] ** -exponents
    if rope["scaling"] == "linear":
        return frequencies / rope["factor"]
    if rope["scaling"] == "llama3":
        turns = rope["original_max_positions"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope["factor"])
    if rope["scaling"] == "yarn":
        low, high = yarn_range(rope, head_dim)
        index = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
        keep = 1 - ((index - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope["factor"])
    if rope["scaling"] == "longrope":
        return frequencies / torch.tensor(rope["short_factor"], dtype=torch.float64, device=device)
    return frequencies


def yarn_range(rope: dict[str, Any], head_dim: int) -> tuple[float, float]:
    """The channels between which "yarn" goes over to stretching (arXiv:2309.00071)."""

    def channel(turns: float) -> float:
        wavelength = rope["original_max_positions"] / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope["theta"]))

    low, high = channel(rope["beta_fast"]), channel(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def rotary_scale(rope: dict[str, Any]) -> float:
    """Factor on cosine and sine."""
    if rope["scaling"] not in ("yarn", "longrope"):
        return 1.0
    if rope["attention_factor"] is not None:
        return rope["attention_factor"]
    factor = rope["factor"]
    if factor <= 1:
        return 1.0
    if rope["scaling"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(rope["original_max_positions"]))
    scales = [
        1 + 0.1 * (rope[name] or 0) * math.log(factor) for name in ("mscale", "mscale_all_dim")
    ]
    if rope["mscale"] and rope["mscale_all_dim"]:
        return scales[0] / scales[1]
    return 1 + 0.1 * math.log(factor)


class Rotation(NamedTuple):
    """Cosine and sine of every token's rotation, float32 [B, T, 1, D / 2].

    `scale` is in both of them.
    """

    cos: Tensor
    sin: Tensor
    scale: float

    @classmethod
    def at(cls, positions: Tensor, rope: dict[str, Any], head_dim: int) -> "Rotation":
        """The rotations at positions [B, T]; in float32 the angle of a far token would be off."""
        frequencies = rotary_frequencies(rope, head_dim, positions.device)
        angles = (positions[..., None, None].double() * frequencies) % (2 * math.pi)
        scale = rotary_scale(rope)
        return cls((angles.cos() * scale).float(), (angles.sin() * scale).float(), scale)

    def back(self) -> "Rotation":
        """The rotations back, which take the scale out again."""
        undo = self.scale**-2
        return Rotation(self.cos * undo, -self.sin * undo, 1 / self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates channel i of [B, T, heads, D] together with channel i + D / 2."""
        first, second = widen(x).chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x.dtype)


# --- Softmax attention ---------------------------------------------------------------------------


class LayerContext(NamedTuple):
    """What all layers of a kind know about the tokens of a call.

    Attributes:
      rows: where they stand.
      rotation: of their queries and keys; None: positions are in the embeddings.
      first_rotation: of queries that look at the first tokens, whose distance is capped at
        window + sinks and so never leaves what was trained.
      held: tokens in a memory of evicted ones at each place [B, T], below 1: none; None: there is
        no such memory, or no row has lost a token yet.
      rotation_back: of cached tokens that leave the window, at the first W places.
    """

    rows: Rows
    rotation: Rotation | None = None
    first_rotation: Rotation | None = None
    held: Tensor | None = None
    rotation_back: Rotation | None = None

    @classmethod
    def of_kind(cls, config: TitanConfig, kind: str, rows: Rows) -> "LayerContext":
        """Computes the rotations of "full", "sliding" or "kept" layers."""
        window, sinks, positions = config.window(kind), config.num_sinks(kind), rows.positions()
        first = held = back = None
        if window is not None and config.evicts(kind, rows.longest):
            held = positions + 1 - window - sinks
        if config.position_embedding != "rotary":
            return cls(rows, held=held)
        rope = config.rope
        if kind == "sliding" and config.sliding_rope is not None:
            rope = config.sliding_rope
        if window is not None and sinks:
            first = Rotation.at(positions.clamp(max=window + sinks), rope, config.head_dim)
        if window is not None and held is not None:
            back = Rotation.at(positions[:, :window] - window, rope, config.head_dim).back()
        return cls(rows, Rotation.at(positions, rope, config.head_dim), first, held, back)


class SoftmaxAttention(nn.Module):
    """softmax(scale q k^T) v over the tokens before, or a window of them and the first ones."""

    def __init__(self, config: TitanConfig, kind: str) -> None:
        """Has no parameters."""
        super().__init__()
        scale = config.query_scale
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.softcap = config.attention_softcap
        self.window, self.sinks = config.window(kind), config.num_sinks(kind)

    def evicted(
        self, k: Tensor, v: Tensor, context: LayerContext, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Unrotated key and value [B, T, K, D] of the token leaving the window at each position.

        They come out of the cache, before this call's tokens go in, or from the call itself; what
        stands where no token leaves has no meaning.
        """
        assert self.window is not None, "without a window no token leaves"
        tokens, lost = k.shape[1], []
        for name, new, back in (("keys", k, context.rotation_back), ("values", v, None)):
            old = cache.get(name, new)
            missing = self.window - old.shape[1]
            old = F.pad(old[:, : tokens - missing], (0, 0, 0, 0, missing, 0))
            lost.append(torch.cat([old if back is None else back(old), new], dim=1)[:, :tokens])
        return lost[0], lost[1]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, context: LayerContext, cache: LayerCache
    ) -> tuple[Tensor, Tensor | None]:
        """Attends, and puts the tokens into the cache.

        Args:
          q: queries [B, T, H, D], not rotated.
          k: keys [B, T, K, D], likewise.
          v: values [B, T, K, D].
          context: of the tokens.
          cache: of the layer.

        Returns:
          [B, T, H, D], and the log of the softmax's normaliser [B, T, H], at least float32, where
          tokens are evicted.
        """
        rows, first_q = context.rows, q
        if context.rotation is not None:
            if context.first_rotation is not None:
                first_q = context.first_rotation(q)
            q, k = context.rotation(q), context.rotation(k)
        keys = torch.cat([cache.get("keys", k), k], dim=1)
        values = torch.cat([cache.get("values", v), v], dim=1)
        first = self._first_tokens(k, v, rows, cache) if self.sinks else None
        # Rows that fit into the window get the base model's attention, to the bit.
        sinks = 0 if self.window is None or rows.longest <= self.window else self.sinks
        held = keys.shape[1] - rows.tokens
        positions = rows.positions(held)
        outs, masses = [], []
        for start in range(0, rows.tokens, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, rows.tokens)
            begin = 0 if self.window is None else max(0, held + start + 1 - self.window)
            place = positions[:, None, begin : held + stop]
            query = positions[:, held + start : held + stop, None]
            visible = (place >= sinks) & (place <= query)
            if self.window is not None:
                visible &= place > query - self.window
            logits = self._logits(q[:, start:stop], keys[:, begin : held + stop], visible)
            seen = values[:, begin : held + stop]
            if first is not None and sinks:
                visible = torch.arange(sinks, device=q.device) <= query
                logits = torch.cat(
                    [self._logits(first_q[:, start:stop], first[0], visible), logits], dim=-1
                )
                seen = torch.cat([first[1], seen], dim=1)
            weights = logits.softmax(dim=-1).to(v.dtype)
            if context.held is not None:
                masses.append(logits.logsumexp(dim=-1).flatten(1, 2).mT)
            outs.append(torch.einsum("bkgts,bskd->btkgd", weights, seen).flatten(2, 3))
        size = rows.longest if self.window is None else min(self.window, rows.longest)
        cache.tensors |= {"keys": rows.last(keys, size), "values": rows.last(values, size)}
        return torch.cat(outs, dim=1), torch.cat(masses, dim=1) if masses else None

    def _logits(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """[B, K, G, T, S] in at least float32."""
        grouped = q.unflatten(2, (k.shape[2], -1))
        logits = widen(torch.einsum("btkgd,bskd->bkgts", grouped, k)) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.masked_fill(~visible[:, None, None], -1e30)

    def _first_tokens(
        self, k: Tensor, v: Tensor, rows: Rows, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens [B, Z, K, D], as far as they have come."""
        place = torch.arange(self.sinks, device=k.device) - rows.length[:, None]
        index, is_new = place.clamp(0, rows.tokens - 1), (place >= 0)[:, :, None, None]
        for name, new in (("first_keys", k), ("first_values", v)):
            old = cache.get(name, new, self.sinks)
            cache.tensors[name] = torch.where(is_new, take(new, index), old)
        return cache.tensors["first_keys"], cache.tensors["first_values"]


# --- The memory ----------------------------------------------------------------------------------


def previous_tokens(x: Tensor) -> Tensor:
    """Every token gets the one before it, the first one zero: [B, T, ...] -> [B, T, ...]."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def causal_mean(x: Tensor, known: Tensor) -> Tensor:
    """Mean of the last three tokens of [B, T, K, D]; the first one stands for those before it."""
    wide, has_lag1 = widen(x), known & previous_tokens(known)
    has_lag2 = has_lag1 & previous_tokens(has_lag1)
    lag1 = previous_tokens(wide)
    lag2 = previous_tokens(lag1)
    lag1 = torch.where(has_lag1[..., None, None], lag1, wide)
    lag2 = torch.where(has_lag2[..., None, None], lag2, lag1)
    return (wide + lag1 + lag2) / 3


def log_gate(kind: str, k: Tensor, v: Tensor, known: Tensor) -> Tensor:
    """Log sigmoid(causal mean) of k, v, or their sum for "kv" [B, T, K, D]; "constant": log 0.5."""
    if kind == "constant":
        return torch.full_like(widen(k), math.log(0.5))
    sources = [x for letter, x in (("k", k), ("v", v)) if letter in kind]
    return sum((F.logsigmoid(causal_mean(x, known)) for x in sources), start=torch.zeros(()).to(k))


def virtual_tokens(x: Tensor, count: int, trick: str) -> Tensor:
    """Makes `count` virtual tokens of every token: [B, T, K, D] -> [B, T, N, K, D].

    "derivative": 2^-m times the m-th backward difference (TPTT, eq. 13); "rotary": pairs of
    channels rotated by 2 pi m / N; "combined": their mean.
    """
    if trick == "combined":
        both = [virtual_tokens(widen(x), count, each) for each in ("derivative", "rotary")]
        return ((both[0] + both[1]) / 2).to(x.dtype)
    steps, paired = [widen(x)], x.shape[-1] // 2 * 2
    even, odd = (steps[0][..., start:paired:2] for start in (0, 1))
    for m in range(1, count):
        if trick == "derivative":
            steps.append((steps[-1] - previous_tokens(steps[-1])) / 2)
        else:
            cos, sin = math.cos(2 * math.pi * m / count), math.sin(2 * math.pi * m / count)
            turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
            steps.append(torch.cat([turned.flatten(-2), steps[0][..., paired:]], dim=-1))
    return torch.stack(steps, dim=2).to(x.dtype)


def activate_keys(x: Tensor) -> Tensor:
    """SiLU, then the L2 norm over the head."""
    wide = F.silu(widen(x))
    norm = wide.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
    return (wide / norm).to(x.dtype)


def activate_state(state: Tensor) -> Tensor:
    """S / 2 * gelu(2 S / (|S| + 1e-6)) with the norm of each row (TPTT, eq. 8)."""
    square = state.square().sum(-1, keepdim=True)
    # The square root has no gradient at 0, where a memory starts.
    norm = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    return state / 2 * F.gelu(2 * state / (norm + 1e-6), approximate="tanh")


class Writes(NamedTuple):
    """What tokens do to the memory.

    Attributes:
      k: virtual keys [B, T, N, K, D].
      v: virtual values, likewise.
      beta: write gates [B, T, N, K, 1 or D].
      log_decay: logarithm of the forget gate [B, T, K]; None: nothing is forgotten.
    """

    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Writes":
        """Applies a change to every tensor."""
        return Writes(*(None if x is None else change(x) for x in self))  # pyright: ignore


def step_delta_product(q: Tensor, writes: Writes, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence at the top of this file for one token: q [B, 1, H, D], state [B, K, D, D]."""
    k, v, beta, log_decay = writes.map(lambda x: widen(x)[:, 0])
    if log_decay is not None:
        state = state * log_decay.exp()[..., None, None]
    for step in range(k.shape[1]):
        key, value, gate = k[:, step], v[:, step], beta[:, step]
        read = torch.einsum("bkde,bkd->bke", state, gate * key)
        state = state + key[..., :, None] * (gate * value - read)[..., None, :]
    grouped = widen(q)[:, 0].unflatten(1, (k.shape[2], -1))
    out = torch.einsum("bkde,bkgd->bkge", state, grouped)
    return out.flatten(1, 2)[:, None], state


def chunk_delta_product(q: Tensor, writes: Writes, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same for C tokens at once, q [B, C, H, D]; W_ij = exp(g_{j+1} + ... + g_i) for j <= i.

    L = tril((beta K) K^T * W, -1);   (I + L) R = beta V - (beta K * W_i0) S
    O = (Q * W_i0) S + (Q K^T * W) R;   S <- W_C0 S + (K * W_Cj)^T R
    """
    tokens, steps = writes.k.shape[1:3]
    k, v, beta = (widen(x).permute(0, 3, 1, 2, 4).flatten(2, 3) for x in writes[:3])  # [B, K, M, D]
    grouped = widen(q).unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4)  # [B, K, G, C, D]
    between, from_start, to_end = decay_factors(writes.log_decay, tokens, k)

    def spread(x: Tensor, dim: int) -> Tensor:
        return x.repeat_interleave(steps, dim)

    pairs = spread(between, -1)
    lower = (beta * k) @ k.mT * spread(pairs, -2)
    rhs = beta * v - (beta * k * spread(from_start, -1)[..., None]) @ state
    residual = torch.linalg.solve_triangular(lower.tril(-1), rhs, upper=False, unitriangular=True)
    scores = grouped @ k[:, :, None].mT * pairs[:, :, None]
    out = (grouped * from_start[:, :, None, :, None]) @ state[:, :, None]
    out = (out + scores @ residual[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2, 3)
    kept = from_start[..., -1, None, None] * state
    return out, kept + (k * spread(to_end, -1)[..., None]).mT @ residual


def decay_factors(
    log_decay: Tensor | None, tokens: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """W between tokens [B, K, C, C] (0 for j > i), from before the chunk and to its end [B, K, C].

    Only exponents <= 0 are exponentiated.
    """
    ones = like.new_ones(tokens, tokens + 1)
    if log_decay is None:
        factor = ones.tril(1)[None, None]
    else:
        # Sums over the tokens in between: a difference of running sums would lose the small
        # decays after a large one. exp(-1000) is 0, and 0 * -inf would be NaN.
        decay = widen(log_decay).clamp(min=-1000).mT[..., None]  # [B, K, C, 1]
        sums = ones[:, 1:].tril() @ (decay * ones.tril())
        factor = sums.masked_fill(ones.tril(1) == 0, -math.inf).exp()
    return factor[..., 1:], factor[..., 0], factor[..., -1, 1:]


class LowRankDelta(nn.Module):
    """scale * (x a) b in float32, added to what a shared projection gives."""

    def __init__(self, in_dim: int, out_dim: int, liza: dict[str, Any]) -> None:
        """Creates a [in_dim, rank] and b [rank, out_dim]."""
        super().__init__()
        self.scale = liza["memory_alpha"] / liza["memory_rank"]
        self.a = nn.Parameter(torch.empty(in_dim, liza["memory_rank"], dtype=torch.float32))
        self.b = nn.Parameter(torch.empty(liza["memory_rank"], out_dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as zero."""
        bound = self.a.shape[0] ** -0.5
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim], float32."""
        return (widen(x) @ widen(self.a)) @ widen(self.b) * self.scale


class Affine(nn.Module):
    """x W^T + b in float32, a small map of the memory's own."""

    def __init__(self, in_dim: int, bias: list[float]) -> None:
        """Creates a weight [out_dim, in_dim] and a bias that starts as this one [out_dim]."""
        super().__init__()
        self.start = bias
        self.weight = nn.Parameter(torch.empty(len(bias), in_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(len(bias), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as the bias alone."""
        nn.init.zeros_(self.weight)
        copy_(self.bias, torch.tensor(self.start))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim], at least float32."""
        return F.linear(widen(x), widen(self.weight), widen(self.bias))


class HeadMap(nn.Module):
    """w q + b of every head in float32, perhaps with a log n added, of n up to a limit."""

    def __init__(self, heads: int, dim: int, bias: float, *, slope: bool = False) -> None:
        """Creates w [H, D], b [H] that starts as `bias`, and perhaps a [H] and log limits [H]."""
        super().__init__()
        self.start = bias
        self.weight = nn.Parameter(torch.empty(heads, dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.slope = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if slope else None
        # Says what the gate was fitted on, and is not trained.
        limit = torch.empty(heads, dtype=torch.float32)
        self.limit = nn.Parameter(limit, requires_grad=False) if slope else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts with w = 0, a = 1 and 1,024 tokens."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)
        if self.slope is not None:
            nn.init.ones_(self.slope)
        if self.limit is not None:
            nn.init.constant_(self.limit, math.log(1024))

    def forward(self, q: Tensor, n: Tensor | None = None) -> Tensor:
        """Queries [B, T, H, D], and n [B, T] if it counts -> [B, T, H]."""
        out = (widen(q) * self.weight).sum(-1) + self.bias
        if self.slope is None or self.limit is None or n is None:
            return out
        log_n = torch.minimum(n.to(out.dtype).log()[..., None], self.limit.detach().to(out.dtype))
        return out + self.slope * log_n


def forget_beyond(horizon: int, held: Tensor, writes: Writes) -> Writes:
    """Writes with no half-life above half the horizon where more tokens are held [B, T]."""
    log_decay = writes.log_decay
    if log_decay is None:
        log_decay = widen(writes.k).new_zeros((*held.shape, writes.k.shape[-2]))
    most = log_decay.clamp(max=math.log(0.5) / (horizon / 2))
    return writes._replace(log_decay=torch.where(held[..., None] > horizon, most, log_decay))


class DeltaMemory(nn.Module):
    """Gates, virtual tokens, the recurrence, and the size of the output."""

    def __init__(self, config: TitanConfig, heads: int, kv_heads: int) -> None:
        """Creates what `liza` asks for: low-rank deltas, gates, a factor on the output."""
        super().__init__()
        liza = self.liza = config.liza
        dim, width = config.head_dim, config.hidden_size
        self.q_delta = self.k_delta = self.v_delta = None
        if liza["memory_rank"]:
            source = 2 * kv_heads * dim if liza["writes"] == "evicted" else width
            self.q_delta = LowRankDelta(width, heads * dim, liza)
            self.k_delta = LowRankDelta(source, kv_heads * dim, liza)
            self.v_delta = LowRankDelta(source, kv_heads * dim, liza)
        # Gates that are learned; forget gates start with half-lives of 38 to 280 tokens.
        self.gates = nn.ModuleDict()
        if liza["beta_gate"] == "projected":
            start = [0.0] * liza["num_householder"] * kv_heads
            self.gates["beta"] = Affine(2 * kv_heads * dim, start)
        if liza["alpha_gate"] == "projected":
            spread = [4 + 2 * i / max(kv_heads - 1, 1) for i in range(kv_heads)]
            start = spread if kv_heads > 1 else [5.0]
            self.gates["keep"] = Affine(2 * kv_heads * dim, start)
        self.scale = HeadMap(heads, dim, 0.0) if liza["linear_scale"] == "learned" else None
        # Every place writes the token `delay` places before, and never the first ones.
        self.delay = self.sinks = 0
        if liza["writes"] == "evicted":
            self.delay, self.sinks = config.window("full") or 0, config.num_sinks("full")
        # Written tokens before the current one that gates and virtual tokens depend on.
        alpha, beta = (
            2 if liza[gate] in ("k", "v", "kv") else 0 for gate in ("alpha_gate", "beta_gate")
        )
        steps = 0 if liza["trick"] == "rotary" else liza["num_householder"] - 1
        self.history = max(alpha, beta, steps, beta + steps if liza["expand_gates"] else 0)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, cache: LayerCache
    ) -> Tensor:
        """Writes a token and reads at each place.

        Args:
          x: input of the layer [B, T, E].
          q: queries [B, T, H, D] before any rotation; raw, or after any q norm if the memory
            holds evicted tokens.
          k: keys [B, T, K, D] of the written tokens, likewise.
          v: their values [B, T, K, D].
          rows: where the tokens of this call stand.
          cache: of the layer; it takes the written tokens in.

        Returns:
          [B, T, H, D]; without a learned scale all heads of a token together have an RMS of 1.
        """
        # Its float32 is not for autocast to lower.
        with torch.autocast(q.device.type, enabled=False):
            pair = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)
            source = pair if self.liza["writes"] == "evicted" else x
            deltas = ((self.q_delta, q, x), (self.k_delta, k, source), (self.v_delta, v, source))
            asked, k, v = (
                y if delta is None else y + delta(z).view(y.shape).to(y.dtype)
                for delta, y, z in deltas
            )
            writes = self._writes(pair, k, v, rows, cache)
            out = self._recur(activate_keys(asked), writes, rows, cache)
            if self.scale is not None:
                out = out * self.scale(q).clamp(-4, 4).exp()[..., None]
            else:
                out = rms_normalize(out.to(q.dtype).flatten(2)).view(q.shape)
            return F.dropout(out, self.liza["dropout"], self.training).to(q.dtype)

    def _writes(self, pair: Tensor, k: Tensor, v: Tensor, rows: Rows, cache: LayerCache) -> Writes:
        """What the tokens of each place do; `pair` is k and v before deltas [B, T, 2 K D]."""
        liza, count, tokens = self.liza, self.liza["num_householder"], rows.tokens
        positions = rows.positions(self.history) - self.delay
        known = positions >= 0
        k = torch.cat([cache.get("raw_keys", k, self.history), k], dim=1)
        v = torch.cat([cache.get("raw_values", v, self.history), v], dim=1)
        k, v = (x * known[..., None, None] for x in (k, v))
        cache.tensors["raw_keys"] = rows.last(k, self.history)
        cache.tensors["raw_values"] = rows.last(v, self.history)
        keys = virtual_tokens(activate_keys(k), count, liza["trick"])
        values = v if self.scale is not None else v * v.shape[-1] ** -0.5
        values = virtual_tokens(values, count, liza["trick"])
        writes = Writes(keys, values, *self._gates(pair, k, v, known))
        # What comes from earlier calls has been written.
        writes = writes.map(lambda x: x[:, x.shape[1] - tokens :])
        if liza["horizon"] is not None:
            held = positions[:, self.history :] + 1 - self.sinks
            writes = forget_beyond(liza["horizon"], held, writes)
        if not rows.is_padded and not self.delay:
            return writes
        written = (positions[:, self.history :] >= self.sinks) & rows.valid()
        return writes.map(lambda x: x * written.view(*written.shape, *(1,) * (x.ndim - 2)))

    def _gates(
        self, pair: Tensor, k: Tensor, v: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Write gates [B, T, N, K, 1 or D], and the logarithm of the forget gate [B, T, K]."""
        liza, count = self.liza, self.liza["num_householder"]
        if "beta" in self.gates:
            beta = self.gates["beta"](pair).sigmoid().unflatten(-1, (count, -1))[..., None]
        else:
            beta = log_gate(liza["beta_gate"], k, v, known).exp()
            if liza["expand_gates"]:
                beta = virtual_tokens(beta * known[..., None, None], count, liza["trick"])
            else:
                beta = beta[:, :, None].expand(-1, -1, count, -1, -1)
            if not liza["vector_beta"]:
                beta = beta.mean(-1, keepdim=True)
        if "keep" in self.gates:
            return beta, F.logsigmoid(self.gates["keep"](pair))
        if liza["alpha_gate"] == "constant":
            return beta, None
        gates = log_gate(liza["alpha_gate"], k, v, known)
        # Rounding must not turn a gate of almost 1 into growth.
        return beta, (gates.logsumexp(-1) - math.log(gates.shape[-1])).clamp(max=0)

    def _recur(self, q: Tensor, writes: Writes, rows: Rows, cache: LayerCache) -> Tensor:
        """[B, T, H, D], and the new state in the cache."""
        size, length = self.liza["chunk_size"], rows.length - self.delay
        activates = self.liza["state_activation"] == "gelu"
        if activates and bool((length % size).any()):
            size = 1  # Chunks are counted from the first written token of each row.
        heads, dim = writes.k.shape[-2:]
        state = cache.tensors.get("state")
        if state is None:
            state = widen(q).new_zeros(q.shape[0], heads, dim, dim)
        outs = []
        for start in range(0, rows.tokens, size):
            stop = min(start + size, rows.tokens)
            run = step_delta_product if stop - start == 1 else chunk_delta_product
            part = writes.map(lambda x, span=slice(start, stop): x[:, span])
            out, state = run(q[:, start:stop], part, state)
            outs.append(out)
            if activates:
                seen = length + stop
                due = (seen > 0) & (seen % self.liza["chunk_size"] == 0) & (stop <= rows.counts)
                state = torch.where(due[:, None, None, None], activate_state(state), state)
        cache.tensors["state"] = state
        return torch.cat(outs, dim=1)


class MemoryGate(nn.Module):
    """mu = sigmoid(logit), one per head."""

    def __init__(self, heads: int, init: float) -> None:
        """Creates logits [H] that start at the share `init`."""
        super().__init__()
        self.init = init
        self.logit = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives every head the share it starts with."""
        nn.init.constant_(self.logit, math.log(self.init) - math.log1p(-self.init))

    def forward(self) -> Tensor:
        """[H, 1]."""
        return torch.sigmoid(self.logit)[:, None]


def match_rms(linear: Tensor, soft: Tensor) -> Tensor:
    """Gives every head of `linear` [B, T, H, D] the RMS that it has in `soft`."""
    soft_square, linear_square = (widen(x).square().mean(-1, keepdim=True) for x in (soft, linear))
    # All heads together have unit RMS, so 1e-6 only guards those that are silent.
    return linear * ((soft_square + 1e-12) / (linear_square + 1e-6)).sqrt().to(linear.dtype)


# --- The decoder ---------------------------------------------------------------------------------


class TitanAttention(nn.Module):
    """Shared projections, softmax attention and the memory, mixed by Memory as Gate."""

    def __init__(self, config: TitanConfig, layer: int) -> None:
        """Creates the projections, the q/k norms, and what the memory needs of its own."""
        super().__init__()
        embed, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads, kv_heads, _ = config.layer_size(layer)
        self.liza, self.head_dim, self.clip = config.liza, dim, config.clip_qkv
        self.sizes = [heads, kv_heads, kv_heads]
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(embed, sum(self.sizes) * dim, bias)
        else:
            self.q_proj = nn.Linear(embed, heads * dim, bias)
            self.k_proj = nn.Linear(embed, kv_heads * dim, bias)
            self.v_proj = nn.Linear(embed, kv_heads * dim, bias)
        self.o_proj = nn.Linear(heads * dim, embed, config.attention_out_bias)
        self.q_norm = self.k_norm = self.softmax = self.memory = self.mag = None
        if config.qk_norm is not None:
            full = config.qk_norm == "full"
            self.q_norm = TitanNorm(config, heads * dim if full else dim, bias=False)
            self.k_norm = TitanNorm(config, kv_heads * dim if full else dim, bias=False)
        if self.liza is None or self.liza["softmax"]:
            self.softmax = SoftmaxAttention(config, config.layer_kind(layer))
        if config.has_memory(config.layer_kind(layer)):
            self.memory = DeltaMemory(config, heads, kv_heads)
            if self.liza["mag"] == "mass":
                # A small share at the start: nothing has taught the memory yet.
                self.mag = HeadMap(heads, dim, -4.0, slope=True)
            elif self.liza["mag"] == "learned" and self.liza["softmax"]:
                self.mag = MemoryGate(heads, self.liza["mag_init"])

    def forward(
        self, x: Tensor, context: LayerContext, share: Tensor | None, cache: LayerCache
    ) -> Tensor:
        """[B, T, E] -> [B, T, E]; `share` is mu where it is the same for all heads."""
        q, k, v = self._project(x)
        soft, mass, written = None, None, (q, k, v)
        if self.softmax is not None:
            q, k = self._normalize(q, self.q_norm), self._normalize(k, self.k_norm)
            v = self._clip(v)
            if context.held is not None:
                written = (q, *self.softmax.evicted(k, v, context, cache))
            soft, mass = self.softmax(q, k, v, context, cache)
        linear = None
        if self.memory is not None and (self.liza["writes"] == "all" or context.held is not None):
            linear = self.memory(x, *written, context.rows, cache)
        if soft is None or linear is None:
            return self.o_proj((linear if soft is None else soft).flatten(2))  # pyright: ignore
        return self._mix(soft, linear, self._share(q, mass, context.held, share))

    def _share(self, q: Tensor, mass: Tensor | None, held: Tensor | None, common: Any) -> Any:
        """mu, to be multiplied with [B, T, H, D]; 0 where a memory of evicted tokens is empty."""
        if mass is not None and held is not None and isinstance(self.mag, HeadMap):
            share = torch.sigmoid(self.mag(q, held.clamp(min=1)) - mass)[..., None]
        else:
            share = common if self.mag is None else self.mag()
        return share if held is None else share * (held > 0)[..., None, None]

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        """Raw queries [B, T, H, D], keys and values [B, T, K, D]."""
        if hasattr(self, "qkv_proj"):
            return self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.sizes, dim=2)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [each(x).unflatten(-1, (-1, self.head_dim)) for each in projections]

    def _normalize(self, x: Tensor, norm: TitanNorm | None) -> Tensor:
        """Over each head, or over all heads together, as wide as the norm's weight is."""
        if norm is not None and norm.weight is not None:
            x = norm(x.flatten(2).unflatten(2, (-1, norm.weight.shape[0]))).view(x.shape)
        return self._clip(x)

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _mix(self, soft: Tensor, linear: Tensor, mu: Any) -> Tensor:
        """(1 - mu) o_s + mu o_m, projected once; "projected" and `cross_gate` need it twice."""
        mu = mu.to(soft.dtype)
        if self.liza["linear_scale"] == "match":
            linear = match_rms(linear, soft)
        projected = self.liza["linear_scale"] == "projected"
        if not projected and not self.liza["cross_gate"]:
            return self.o_proj(((1 - mu) * soft + mu * linear).flatten(2))
        soft_term = self.o_proj(((1 - mu) * soft).flatten(2))
        # The bias belongs to the sum once.
        linear_term = self.o_proj((mu * linear).flatten(2))
        if self.o_proj.bias is not None:
            linear_term = linear_term - self.o_proj.bias
        if projected:
            square = self.o_proj(soft.flatten(2)).float().square().mean(-1, keepdim=True)
            linear_term = linear_term * (square + 1e-5).sqrt().to(linear_term.dtype)
        if self.liza["cross_gate"]:
            return soft_term + linear_term + soft_term * linear_term
        return soft_term + linear_term


def activation(name: str, x: Tensor) -> Tensor:
    """SiLU or the GELU with tanh."""
    return {"silu": F.silu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}[name](x)


class TitanMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(self, config: TitanConfig, layer: int) -> None:
        """Creates two or three projections."""
        super().__init__()
        embed, width, bias = config.hidden_size, config.layer_size(layer)[2], config.mlp_bias
        self.activation = config.activation
        self.gate_proj = nn.Linear(embed, width, bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(embed, width, bias)
        self.down_proj = nn.Linear(width, embed, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        if self.gate_proj is None:
            return self.down_proj(activation(self.activation, self.up_proj(x)))
        return self.down_proj(activation(self.activation, self.gate_proj(x)) * self.up_proj(x))


class TitanExperts(nn.Module):
    """The matrices of all experts, each [experts, in, out]."""

    def __init__(self, config: TitanConfig, layer: int) -> None:
        """Creates two or three of them."""
        super().__init__()
        count, embed, width = config.num_experts, config.hidden_size, config.layer_size(layer)[2]
        self.activation = config.activation
        inward, outward = (count, embed, width), (count, width, embed)
        self.gate_proj = nn.Parameter(torch.empty(inward)) if config.gated_mlp else None
        self.up_proj = nn.Parameter(torch.empty(inward))
        self.down_proj = nn.Parameter(torch.empty(outward))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives random values of the size that outputs like the inputs need."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """What one expert makes of [tokens, E]."""
        up = x @ self.up_proj[expert]
        if self.gate_proj is None:
            return activation(self.activation, up) @ self.down_proj[expert]
        gate = activation(self.activation, x @ self.gate_proj[expert])
        return (gate * up) @ self.down_proj[expert]


class TitanExpertsMLP(nn.Module):
    """sum over the chosen experts of weight * expert(x); the router's softmax is over all."""

    def __init__(self, config: TitanConfig, layer: int) -> None:
        """Creates the router and the experts."""
        super().__init__()
        self.chosen, self.normalize = config.experts_per_token, config.normalize_expert_weights
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = TitanExperts(config, layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        rows = x.flatten(0, 1)
        shares = F.linear(widen(rows), widen(self.router.weight)).softmax(dim=-1)
        weights, experts = shares.topk(self.chosen, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for expert in experts.unique().tolist():
            row, rank = (experts == expert).nonzero(as_tuple=True)
            part = self.experts(rows[row], expert).to(x.dtype)
            out = out.index_add(0, row, part * weights[row, rank, None].to(x.dtype))
        return out.view(x.shape)


class TitanLayer(GradientCheckpointingLayer):
    """Attention and MLP around the residual stream."""

    def __init__(self, config: TitanConfig, layer: int) -> None:
        """Creates one layer, with norms before, after, or on both sides of its sublayers."""
        super().__init__()

        def norm(*placements: str) -> TitanNorm | None:
            return residual_norm(config) if config.norm_placement in placements else None

        self.kind = config.layer_kind(layer)
        self.attn_norm, self.attn_post_norm = norm("before", "both"), norm("after", "both")
        self.self_attn = TitanAttention(config, layer)
        self.mlp_norm, self.mlp_post_norm = norm("before", "both"), norm("after", "both")
        self.mlp = (TitanExpertsMLP if config.num_experts else TitanMLP)(config, layer)

    def forward(
        self,
        x: Tensor,
        contexts: dict[str, LayerContext],
        share: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, E] -> [B, T, E]."""

        def apply(norm: TitanNorm | None, y: Tensor) -> Tensor:
            return y if norm is None else norm(y)

        context, cache = contexts[self.kind], LayerCache() if cache is None else cache
        attended = self.self_attn(apply(self.attn_norm, x), context, share, cache)
        x = x + apply(self.attn_post_norm, attended)
        return x + apply(self.mlp_post_norm, self.mlp(apply(self.mlp_norm, x)))


def residual_norm(config: TitanConfig) -> TitanNorm:
    """A norm of the residual stream."""
    kinds = {"kind": config.norm, "weight": config.norm_weight, "bias": config.norm_bias}
    return TitanNorm(config, config.hidden_size, **kinds)


class TitanEmbedding(nn.Embedding):
    """Token embeddings, multiplied by `scale` in their own dtype."""

    def __init__(self, config: TitanConfig) -> None:
        """Creates the table."""
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else None

    def forward(self, input: Tensor) -> Tensor:
        """[B, T] -> [B, T, E]."""
        x = super().forward(input)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype)


class TitanForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model."""

    config_class = TitanConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    config: TitanConfig
    _input_embed_layer = "embed"
    _no_split_modules = ["TitanLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["mag", "memory", "mag_share"]  # noqa: RUF012
    _is_stateful = True  # Tokens cannot be taken back, as assisted generation would.

    def __init__(self, config: TitanConfig) -> None:
        """Creates random weights."""
        super().__init__(config)
        check_settings(config)
        self.embed = TitanEmbedding(config)
        self.positions = None
        if config.position_embedding == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TitanLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = residual_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        liza, share = config.liza, None
        if liza is not None and liza["mag"] == "scheduled" and liza["softmax"]:
            share = torch.tensor(liza["mag_init"], dtype=torch.float32)
        self.register_buffer("mag_share", share)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        own = (TitanNorm, TitanExperts, LowRankDelta, Affine, HeadMap, MemoryGate)
        if isinstance(module, own):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a TitanCache.

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitanCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: TitanCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every place.

        Args:
          input_ids: [B, T].
          attention_mask: 0 marks padding, anywhere in a row, which is as if it were not there;
            of this call's tokens [B, T] or of all tokens so far.
          position_ids: must be what the mask says: tokens of the row before each token.
          past_key_values: what an earlier call returned; newer versions of transformers say
            `cache`.
          inputs_embeds: instead of input_ids [B, T, E].
          labels: tokens [B, T] whose loss is wanted, -100 where not.
          use_cache: whether to return a cache; None: unless the model is being trained.
          logits_to_keep: only the last places, or the places with these numbers; 0: all.
          cache: the same as past_key_values.
          **kwargs: `output_hidden_states`, and arguments of the loss.
        """
        cache = past_key_values if cache is None else cache
        if not isinstance(cache, TitanCache | None):
            raise ValueError(
                f"a Titan needs the cache that it returns, or none; got a {type(cache).__name__}."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = TitanCache(len(self.layers))
        rows, order = self._rows(x, attention_mask, position_ids, cache)
        x = x if order is None else take(x, order)
        states = [x]
        if self.positions is not None:
            x = x + self.positions(rows.positions().clamp(max=self.positions.num_embeddings - 1))
        contexts = {
            kind: LayerContext.of_kind(self.config, kind, rows)
            for kind in {self.config.layer_kind(layer) for layer in range(len(self.layers))}
        }
        for number, layer in enumerate(self.layers):
            held = None if cache is None else cache.layers[number]
            x = layer(x, contexts, self.mag_share, cache=held)
            states.append(x)
        if cache is not None:
            cache.length, cache.longest = rows.length + rows.counts, rows.longest
            cache.columns += rows.tokens
        states[-1] = x = self.final_norm(x)
        if order is not None:
            back = order.argsort(dim=1)
            x, states = take(x, back), [take(state, back) for state in states]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        if (cap := self.config.final_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        shows_states = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        carried: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        shown = tuple(states) if shows_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=shown, **carried)

    def _rows(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: TitanCache | None
    ) -> tuple[Rows, Tensor | None]:
        """Where the tokens stand, and the order [B, T] that moves padding behind them, if any."""
        (batch, tokens), device = x.shape[:2], x.device
        length, longest, seen = torch.zeros(batch, dtype=torch.long, device=device), 0, 0
        if cache is not None and cache.length is not None:
            length, longest, seen = cache.length, cache.longest, cache.columns
        if mask is not None and (mask.ndim != 2 or mask.shape[1] not in (tokens, seen + tokens)):
            raise ValueError(
                f"attention_mask must be [B, {tokens}] or [B, {seen + tokens}], got "
                f"{list(mask.shape)}; packed rows are not supported, pad them instead."
            )
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        valid = valid if mask is None else mask[:, -tokens:].to(device).bool()
        counts, is_padded = valid.sum(1), mask is not None and not bool(valid.all())
        if position_ids is not None:
            expected = length[:, None] + valid.cumsum(1) - 1
            if not bool(((position_ids == expected) | ~valid).all()):
                raise ValueError(
                    "position_ids must count the tokens of each row from its first; packed or "
                    "shifted rows are not supported."
                )
        if not is_padded:
            return Rows(length, counts, tokens, False, longest + tokens), None
        order = (~valid).long().argsort(dim=1, stable=True)
        return Rows(length, counts, tokens, True, int((length + counts).max())), order


def check_settings(config: TitanConfig) -> None:
    """Raises ValueError for a config.json that asks for something this file does not have."""
    choices = {
        "activation": ("silu", "gelu_tanh"),
        "norm": ("rms", "layer"),
        "norm_placement": ("before", "after", "both"),
        "qk_norm": (None, "head", "full"),
        "position_embedding": ("rotary", "learned"),
    }
    gates = ("projected", "k", "v", "kv", "constant")
    liza_choices = {
        "writes": ("evicted", "all", "none"),
        "mag": ("mass", "learned", "scheduled"),
        "linear_scale": ("learned", "match", "unit", "projected"),
        "beta_gate": gates,
        "alpha_gate": gates,
        "trick": ("derivative", "rotary", "combined"),
        "state_activation": ("none", "gelu"),
    }
    given = {name: getattr(config, name) for name in choices}
    if config.liza is not None:
        choices, given = choices | liza_choices, given | config.liza
        if config.liza["operator"] == "tptt_reference":
            raise ValueError('operator "tptt_reference" is not in this file: use the package tptt.')
    for name, known in choices.items():
        if given.get(name) not in known:
            raise ValueError(f"{name} must be one of {known}, got {given.get(name)!r}.")
    for rope in (config.rope, config.sliding_rope):
        check_rope(rope or {"scaling": "none"})


def check_rope(rope: dict[str, Any]) -> None:
    """Raises ValueError for a rotary embedding that this file does not have."""
    known = ("none", "linear", "llama3", "yarn", "longrope")
    if rope["scaling"] not in known:
        raise ValueError(f"rope scaling must be one of {known}, got {rope['scaling']!r}.")
    if rope["scaling"] == "longrope" and rope["short_factor"] != rope["long_factor"]:
        raise ValueError(
            "longrope scaling needs the same factors for short and long texts here: fix the model "
            "for a length before it is exported."
        )
