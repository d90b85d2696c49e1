"""Rules of llama.cpp's key tables that most architectures share."""

import numpy as np

from convert.families.key_tables import TARGET
from convert.rules import (
    IDENTITY,
    TRANSPOSE,
    Rule,
    Transform,
    elementwise,
    interleaved_rotary,
    linear,
)
from tptt_jax import ModelConfig

_BLOCK = "blk.{layer}."
_NORMS = {
    "attn_norm": "attn_norm",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}

_EACH_TRANSPOSED = elementwise(
    "each transposed",
    lambda x: np.swapaxes(x, -1, -2),
    lambda x: np.swapaxes(x, -1, -2),
    lambda shape: (*shape[:-2], shape[-1], shape[-2]),
)


def gguf_rules(
    config: ModelConfig, *, norm: Transform = IDENTITY, interleaved: bool = False
) -> tuple[Rule, ...]:
    """The key table of an architecture.

    Args:
      config: the model.
      norm: transform of the norms' weights (Gemma's are stored as 1 + w).
      interleaved: whether the rows of q and k are stored as pairs (Llama's).

    Returns:
      Rules; those whose target the model lacks do not apply.
    """
    queries = interleaved_rotary(config.num_heads) if interleaved else IDENTITY
    keys = interleaved_rotary(config.num_kv_heads) if interleaved else IDENTITY
    attention = f"{TARGET}self_attn."
    return (
        Rule("token_embd.weight", "embed.embedding"),
        Rule(f"{_BLOCK}attn_q.weight", f"{attention}q_proj.kernel", queries.then(TRANSPOSE)),
        Rule(f"{_BLOCK}attn_q.bias", f"{attention}q_proj.bias", queries),
        Rule(f"{_BLOCK}attn_k.weight", f"{attention}k_proj.kernel", keys.then(TRANSPOSE)),
        Rule(f"{_BLOCK}attn_k.bias", f"{attention}k_proj.bias", keys),
        *linear(f"{_BLOCK}attn_v", f"{attention}v_proj"),
        *linear(f"{_BLOCK}attn_output", f"{attention}o_proj"),
        *(_experts() if config.experts.number else _mlp()),
        *(Rule(f"{_BLOCK}{a}.weight", f"{TARGET}{b}.weight", norm) for a, b in _NORMS.items()),
        Rule("output_norm.weight", "final_norm.weight", norm),
        Rule("output.weight", "lm_head.kernel", TRANSPOSE),
    )


def _mlp() -> tuple[Rule, ...]:
    return tuple(
        rule
        for stored, ours in _MLP.items()
        for rule in linear(f"{_BLOCK}{stored}", f"{TARGET}mlp.{ours}")
    )


def _experts() -> tuple[Rule, ...]:
    """The router, and the experts of a layer in one tensor each."""
    return (
        Rule(f"{_BLOCK}ffn_gate_inp.weight", f"{TARGET}mlp.router.kernel", TRANSPOSE),
        *(
            Rule(f"{_BLOCK}{stored}_exps.weight", f"{TARGET}mlp.{ours}.kernel", _EACH_TRANSPOSED)
            for stored, ours in _MLP.items()
        ),
    )
