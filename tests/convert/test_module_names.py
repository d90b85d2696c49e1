from convert.adapters.module_names import module_names
from convert.families import family_of
from convert.rules import IDENTITY, TRANSPOSE, Rule, linear, split
from tptt_jax import ModelConfig


def test_projections_of_every_layer():
    config = ModelConfig.tiny(num_layers=2)
    names = module_names(family_of("llama").rules(config), config)
    layer = {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    wanted = {f"layers.{i}.{name}": f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    assert names == wanted | {"lm_head": "lm_head"}


def test_other_names_and_conv1d():
    rules = (
        Rule("wte.weight", "embed.embedding"),
        Rule("h.{layer}.attn.c_attn.weight", "layers.{layer}.self_attn.qkv_proj.kernel", IDENTITY),
        Rule("h.{layer}.attn.c_attn.bias", "layers.{layer}.self_attn.qkv_proj.bias"),
    )
    assert module_names(rules, ModelConfig.tiny(num_layers=2)) == {
        "layers.0.self_attn.qkv_proj": "h.0.attn.c_attn",
        "layers.1.self_attn.qkv_proj": "h.1.attn.c_attn",
    }


def test_joined_modules_are_left_out():
    parts = tuple(f"layers.{{layer}}.mlp.{name}_proj.kernel" for name in ("gate", "up"))
    rules = (
        Rule("layers.{layer}.ffn.proj_1.weight", parts, TRANSPOSE.then(split(1))),
        *linear("layers.{layer}.ffn.proj_2", "layers.{layer}.mlp.down_proj"),
    )
    assert module_names(rules, ModelConfig.tiny(num_layers=1)) == {
        "layers.0.mlp.down_proj": "layers.0.ffn.proj_2"
    }
