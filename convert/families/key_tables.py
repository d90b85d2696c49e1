"""Rules of key tables that most families share: Llama's names."""

from collections.abc import Mapping

from convert.rules import IDENTITY, TRANSPOSE, Rule, linear

SOURCE = "model.layers.{layer}."
TARGET = "layers.{layer}."

PRE_NORMS: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}
"""Norms before each sublayer, as Llama names them."""


def attention_rules() -> tuple[Rule, ...]:
    """Four projections, and q/k norms for models that have them."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    projections = [
        rule
        for name in names
        for rule in linear(f"{SOURCE}self_attn.{name}", f"{TARGET}self_attn.{name}")
    ]
    norms = [
        Rule(f"{SOURCE}self_attn.{name}.weight", f"{TARGET}self_attn.{name}.weight")
        for name in ("q_norm", "k_norm")
    ]
    return (*projections, *norms)


def mlp_rules() -> tuple[Rule, ...]:
    """Gate, up and down projection."""
    names = ("gate_proj", "up_proj", "down_proj")
    return tuple(
        rule for name in names for rule in linear(f"{SOURCE}mlp.{name}", f"{TARGET}mlp.{name}")
    )


def expert_rules() -> tuple[Rule, ...]:
    """A router named gate, and the published experts one by one."""
    source, target = f"{SOURCE}mlp.experts.{{expert}}.", f"{TARGET}mlp."
    return (
        Rule(f"{SOURCE}mlp.gate.weight", f"{target}router.kernel", TRANSPOSE),
        *(
            Rule(f"{source}{name}.weight", f"{target}{name}.kernel", TRANSPOSE)
            for name in ("gate_proj", "up_proj", "down_proj")
        ),
    )


def norm_rules(norms: Mapping[str, str]) -> tuple[Rule, ...]:
    """Norms of a layer, by their names in the checkpoint and ours."""
    return tuple(
        Rule(f"{SOURCE}{theirs}.weight", f"{TARGET}{ours}.weight") for theirs, ours in norms.items()
    )


def outer_rules() -> tuple[Rule, ...]:
    """Embedding, final norm, head."""
    return (
        Rule("model.embed_tokens.weight", "embed.embedding", IDENTITY),
        Rule("model.norm.weight", "final_norm.weight"),
        Rule("lm_head.weight", "lm_head.kernel", TRANSPOSE),
    )


def standard_rules(norms: Mapping[str, str] = PRE_NORMS) -> tuple[Rule, ...]:
    """The table of a family whose checkpoints have Llama's names.

    Args:
      norms: its norms of a layer, theirs -> ours.

    Returns:
      Rules; those whose target a model lacks (biases, q/k norms, an untied head) do not apply.
    """
    return (*outer_rules(), *attention_rules(), *mlp_rules(), *norm_rules(norms))
