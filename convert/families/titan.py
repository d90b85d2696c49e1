"""Our "titan" export: any model of ours in the format of its PyTorch file (convert/titan).

config.json has one key for every setting of ModelConfig, under transformers' name if it has one,
and `liza` with the fields of LizaConfig (`precision` is left to torch's own switches). Weights have
the names of our parameters; linear weights have torch's layout, [out, in], and experts ours,
[experts, in, out].
"""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from convert.errors import ConversionError, listing
from convert.families.family import Family
from convert.families.fields import Fields
from convert.rules import TRANSPOSE, Rule, linear
from tptt_jax import LizaConfig, ModelConfig
from tptt_jax.config import RopeConfig, flat_fields, flat_settings, layer_kinds, nest_settings

MODEL_TYPE = "tptt_titan"
ARCHITECTURE = "TitanForCausalLM"
MODELING_FILE = "modeling_titan.py"
AUTO_MAP = {
    "AutoConfig": "modeling_titan.TitanConfig",
    "AutoModelForCausalLM": f"modeling_titan.{ARCHITECTURE}",
}
_NAMES = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "eos_token_ids": "eos_token_id",
}
_ROPES = ("rope", "sliding_rope")


def _key(name: str) -> str:
    return _NAMES.get(name, name)


def _read_config(fields: Fields) -> ModelConfig:
    values = {
        name: fields.raw[_key(name)]
        for name in flat_fields(ModelConfig)
        if _key(name) in fields.raw
    }
    values["eos_token_ids"] = fields.token_ids("eos_token_id")
    values |= {
        name: _build(RopeConfig, _with_tuples(fields.object(name).raw), fields.origin)
        for name in _ROPES
        if values.get(name) is not None
    }
    return _build(ModelConfig, _with_tuples(values), fields.origin)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces JSON's lists by the tuples of our configurations."""
    return {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}


def read_liza(fields: Fields) -> LizaConfig | None:
    """The memory in a "titan" config.json; None for a plain base model.

    Raises:
      ConversionError: if the memory's settings are invalid, or do not fit the model.
    """
    raw = fields.object("liza").raw
    if not raw:
        return None
    # Older exports have no choice: their memory holds every token.
    liza = _build(LizaConfig, {"writes": "all", **_with_tuples(raw)}, fields.origin)
    try:
        layer_kinds(_read_config(fields), liza)
    except ValueError as error:
        raise ConversionError(f"{fields.origin} describes an impossible model: {error}") from None
    return liza


def _build(kind: type, values: Mapping[str, Any], origin: str) -> Any:
    """Builds a configuration from JSON values; errors name what does not fit."""
    fields = flat_fields(kind)
    if unknown := values.keys() - fields.keys():
        raise ConversionError(
            f"{origin} has settings that this version does not know: {listing(unknown)}; "
            "update tptt_jax, or export it again."
        )
    for name, value in values.items():
        if not _fits(value, fields[name].type):
            raise ConversionError(
                f"{_key(name)} in {origin} cannot be {value!r:.80}: export it again."
            )
    try:
        return kind(**nest_settings(values))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{origin} describes an impossible model: {error}") from None


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value is valid for this type; the configuration's class checks choices.

    In JSON 1 is also a float, and true is not a number.
    """
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    if options:
        return any(_fits(value, option) for option in options)
    if annotation in (int, float):
        numbers = (int, float) if annotation is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    if annotation in (bool, str, NoneType):
        return isinstance(value, annotation)
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(
            _fits(each, get_args(annotation)[0]) for each in value
        )
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def _write_config(config: ModelConfig) -> dict[str, Any]:
    content = {_key(name): value for name, value in flat_settings(config).items()}
    content |= {name: list(value) for name, value in content.items() if isinstance(value, tuple)}
    eos = config.eos_token_ids
    return content | {"eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}


def _norm(name: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{target}.weight"), Rule(f"{name}.bias", f"{target}.bias")


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    layer = "layers.{layer}."
    attention, mlp = f"{layer}self_attn", f"{layer}mlp"
    experts = config.experts.number > 0
    rules = [
        Rule("embed.weight", "embed.embedding"),
        Rule("positions.weight", "embed.positions"),
    ]
    for name in ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"):
        rules += linear(f"{attention}.{name}", f"{attention}.{name}")
    for name in ("q_norm", "k_norm"):
        rules += _norm(f"{attention}.{name}", f"{attention}.{name}")
    for name in ("q_delta", "k_delta", "v_delta"):
        path = f"{attention}.memory.{name}"
        rules += [Rule(f"{path}.a", f"{path}.a"), Rule(f"{path}.b", f"{path}.b")]
    for name in ("gates.beta", "gates.keep"):
        rules += linear(f"{attention}.memory.{name}", f"{attention}.memory.{name}")
    for name in ("mag.logit", "mag.weight", "mag.slope", "mag.bias", "mag.limit"):
        rules.append(Rule(f"{attention}.{name}", f"{attention}.{name}"))
    rules += [
        *_norm(f"{attention}.memory.scale", f"{attention}.memory.scale"),
        Rule(f"{mlp}.router.weight", f"{mlp}.router.kernel", TRANSPOSE),
    ]
    for name in ("gate_proj", "up_proj", "down_proj"):
        if experts:
            rules.append(Rule(f"{mlp}.experts.{name}", f"{mlp}.{name}.kernel"))
        else:
            rules += linear(f"{mlp}.{name}", f"{mlp}.{name}")
    for name in ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"):
        rules += _norm(layer + name, layer + name)
    return (
        *rules,
        *_norm("final_norm", "final_norm"),
        Rule("lm_head.weight", "lm_head.kernel", TRANSPOSE),
        Rule("mag_share", "mag_share"),
    )


FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    read_config=_read_config,
    read_liza=read_liza,
    write_config=_write_config,
    rules=_rules,
    ignored=(r"lm_head\.weight",),
)
