"""Floating-point operations of a workload, counted from its configuration.

Counted are the additions and multiplications of matrix products, 2 m k n for [m, k] by [k, n].
Not counted are element-wise operations, norms, softmax, the optimizer, embedding look-ups,
recomputation in a backward pass, and products whose result is masked: causal attention counts the
keys that a query sees. The count over the time and the machine's peak is therefore a lower bound of
the utilisation, and never above 1.
"""

from tptt_jax import LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import layer_kinds, memory_layers, runs_memory
from tptt_jax.layers.cache import num_sinks, softmax_window
from tptt_jax.ops.delta_product.plan import plan_chunks
from tptt_jax.training.partition import TrainMode

Projections = dict[str, tuple[int, int]]


def operator_flops(
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    householder: int = 1,
    chunk_size: int = 64,
) -> float:
    """One forward pass of `chunk_delta_product` over `tokens` tokens in all rows together.

    With M = C N virtual tokens in a chunk, for each chunk and KV head: L = beta K K^T and the
    product with the inverse of I + L as square matrices, the inverse as a triangular one (M^3 / 3),
    the state's values at the keys, its update; for each query head Q K^T over the chunk, its
    product with the residuals, and the state's values at the queries.

    Args:
      tokens: T times rows; a partial chunk counts proportionally.
      heads: query heads H.
      kv_heads: KV heads K, each with a state.
      head_dim: D.
      value_dim: Dv; None: D.
      householder: N.
      chunk_size: C.
    """
    dim, width = head_dim, value_dim or head_dim
    virtual = chunk_size * householder
    per_kv_head = 2 * virtual**2 * dim + virtual**3 / 3 + 2 * virtual**2 * width
    per_kv_head += 4 * virtual * dim * width
    per_head = 2 * chunk_size * virtual * (dim + width) + 2 * chunk_size * dim * width
    return tokens / chunk_size * (kv_heads * per_kv_head + heads * per_head)


def step_flops(*, heads: int, kv_heads: int, head_dim: int, householder: int) -> float:
    """One token of `step_delta_product`: N times a look-up and an update, and the queries."""
    return 2.0 * head_dim**2 * (2 * householder * kv_heads + heads)


def layer_projections(config: ModelConfig) -> Projections:
    """Input and output width of each matrix that one token passes in one layer, by path.

    Args:
      config: sizes of the layer, see `ModelConfig.of_layer`.
    """
    embed, width = config.embed_dim, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    attention: Projections = {"q_proj": (embed, width)}
    attention |= dict.fromkeys(("k_proj", "v_proj"), (embed, kv_width))
    if config.attention.fused_qkv:
        attention = {"qkv_proj": (embed, width + 2 * kv_width)}
    attention["o_proj"] = (width, embed)
    mlp: Projections = {"up_proj": (embed, config.mlp_dim), "down_proj": (config.mlp_dim, embed)}
    if config.mlp.gated:
        mlp["gate_proj"] = (embed, config.mlp_dim)
    if config.experts.number:
        mlp["router"] = (embed, config.experts.number)
    found = {f"self_attn.{name}": size for name, size in attention.items()}
    return found | {f"mlp.{name}": size for name, size in mlp.items()}


def weights_flops(config: ModelConfig, liza: LizaConfig | None) -> float:
    """One token through the weights of all layers, without the LM head.

    Counts the experts that see the token, and the output projection twice where the memory is mixed
    in after it.
    """
    mixed_after = liza is not None and (liza.cross_gate or liza.linear_scale == "projected")
    total = 0.0
    for layer in range(config.num_layers):
        for path, (rows, columns) in layer_projections(config.of_layer(layer)).items():
            times = 1
            if config.experts.number and path.startswith("mlp.") and path != "mlp.router":
                times = config.experts.per_token
            elif mixed_after and path == "self_attn.o_proj":
                times = 2
            total += 2.0 * times * rows * columns
    return total


def adapter_flops(config: ModelConfig, liza: LizaConfig | None, lora: LoraConfig | None) -> float:
    """One token through all low-rank adapters, the memory's own deltas and gates among them."""
    total = 0.0
    for layer in range(config.num_layers):
        for path, (rows, columns) in layer_projections(config.of_layer(layer)).items():
            # Experts have no adapters.
            adapted = not config.experts.number or not path.startswith("mlp.") or "router" in path
            if lora is not None and adapted and lora.matches(path):
                total += 2.0 * lora.rank * (rows + columns)
    return total + sum(
        _memory_delta_flops(config.of_layer(layer), liza)
        for layer in running_layers(config, liza)
        if liza is not None
    )


def _memory_delta_flops(config: ModelConfig, liza: LizaConfig) -> float:
    """One token through the memory's deltas and projected gates in one layer."""
    width, kv_width = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    source = 2 * kv_width if liza.writes == "evicted" else config.embed_dim
    assert liza.memory_rank is not None
    deltas = liza.memory_rank * (config.embed_dim + width + 2 * (source + kv_width))
    steps = {"beta_gate": liza.recurrence.num_householder, "alpha_gate": 1}
    gates = sum(
        2 * kv_width * config.num_kv_heads * count
        for gate, count in steps.items()
        if getattr(liza, gate) == "projected"
    )
    return 2.0 * (deltas + gates)


def head_flops(config: ModelConfig) -> float:
    """One token's logits."""
    return 2.0 * config.embed_dim * config.vocab_size


def attention_flops(
    config: ModelConfig, liza: LizaConfig | None, tokens: int, *, first: int = 0
) -> float:
    """Softmax attention of one row's tokens from place `first` on: logits and weighted values.

    A query sees itself and the earlier tokens within its layer's window, and the sinks beyond it.
    """
    if liza is not None and not liza.softmax:
        return 0.0
    total = 0.0
    for layer, kind in enumerate(layer_kinds(config, liza)):
        heads, _, _ = config.layer_sizes(layer)
        window, sinks = softmax_window(config, liza, kind), num_sinks(config, liza, kind)
        seen = _visible_pairs(first + tokens, window, sinks) - _visible_pairs(first, window, sinks)
        total += 4.0 * heads * config.head_dim * seen
    return total


def _visible_pairs(tokens: int, window: int | None, sinks: int) -> float:
    """Pairs of query and key among the first `tokens` tokens of a document."""
    full = tokens if window is None else min(tokens, window)
    pairs = full * (full + 1) / 2
    if window is None or tokens <= window:
        return pairs
    beyond = tokens - window
    # The first sinks leave the window one by one.
    leaving = min(beyond, sinks)
    return pairs + beyond * window + leaving * (leaving + 1) / 2 + (beyond - leaving) * sinks


def memory_flops(config: ModelConfig, liza: LizaConfig | None, tokens: int) -> float:
    """The memory's operator over tokens of one call, in all layers."""
    if liza is None or tokens == 0:
        return 0.0
    exact = liza.recurrence.state_activation != "none"
    return sum(
        operator_flops(
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.head_dim,
            householder=liza.recurrence.num_householder,
            chunk_size=plan_chunks(tokens, liza.chunk_size, exact=exact).chunk_size,
        )
        for heads, kv_heads, _ in map(config.layer_sizes, running_layers(config, liza))
    )


def row_memory_flops(config: ModelConfig, liza: LizaConfig | None, tokens: int) -> float:
    """The same for a row that is read without a cache.

    Nothing is evicted at the first places, so these are left out, also for the memory's own deltas,
    which `adapter_flops` counts for every token.
    """
    if liza is None or liza.writes != "evicted" or liza.softmax_window is None:
        return memory_flops(config, liza, tokens)
    left_out = min(liza.softmax_window, max(tokens - 1, 0))
    deltas = sum(
        _memory_delta_flops(config.of_layer(layer), liza) for layer in running_layers(config, liza)
    )
    return memory_flops(config, liza, tokens - left_out) - left_out * deltas


def running_layers(config: ModelConfig, liza: LizaConfig | None) -> tuple[int, ...]:
    """The layers whose memory is active."""
    return memory_layers(config, liza) if runs_memory(config, liza) else ()


def training_flops(
    config: ModelConfig,
    liza: LizaConfig | None,
    lora: LoraConfig | None,
    *,
    batch: int,
    tokens: int,
    mode: TrainMode = "lora",
) -> float:
    """One optimizer step on `batch` rows of `tokens` tokens.

    A frozen weight counts twice: in the forward pass, and in the gradient of its input. A trained
    weight or adapter, attention and the memory count three times: both operands have gradients.
    "projections" counts q, k, v and o as trained.
    """
    weights, head = weights_flops(config, liza), head_flops(config)
    trained = weights + head if mode == "full" else 0.0
    if mode == "projections":
        trained = sum(
            2.0 * rows * columns
            for layer in range(config.num_layers)
            for path, (rows, columns) in layer_projections(config.of_layer(layer)).items()
            if path.startswith("self_attn.")
        )
    per_token = 2 * (weights + head) + trained + 3 * adapter_flops(config, liza, lora)
    per_row = attention_flops(config, liza, tokens) + row_memory_flops(config, liza, tokens)
    return batch * (tokens * per_token + 3 * per_row)


def decoding_flops(
    config: ModelConfig, liza: LizaConfig | None, *, batch: int, prompt: int, tokens: int
) -> float:
    """Reading `prompt` tokens and decoding `tokens` more, which are read as well.

    Logits are computed for the new tokens only.
    """
    per_row = (prompt + tokens) * (weights_flops(config, liza) + adapter_flops(config, liza, None))
    per_row += tokens * head_flops(config) + attention_flops(config, liza, prompt + tokens)
    per_row += memory_flops(config, liza, prompt)
    if liza is not None:
        for heads, kv_heads, _ in map(config.layer_sizes, running_layers(config, liza)):
            step = step_flops(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=config.head_dim,
                householder=liza.recurrence.num_householder,
            )
            per_row += tokens * step
    return batch * per_row
