"""Adapters that `peft` wrote and reads, on tiny models of transformers."""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import ConversionError, export_pretrained, load_pretrained
from tests.contracts import logits_of
from tests.parity import test_families, test_transformers
from tests.parity.test_transformers import TOKENS
from tests.parity.torch_models import build, relative_error, reload, torch_logits
from tptt_jax import LizaConfig, LoraConfig

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # Asked by peft of transformers, every time.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CONFIGS = test_transformers.CONFIGS | test_families.CONFIGS
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "list": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 6},
    "rslora": {"target_modules": EVERY, "use_rslora": True, "lora_alpha": 3},
    "mlp": {"target_modules": ["mlp.up_proj", "down_proj"], "lora_alpha": 2.5},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "regex": {"target_modules": r".*\.(self_attn\.[qk]_proj|mlp\.gate_proj)"},
    "regex, some layers": {
        "target_modules": r"model\.layers\.(0\.self_attn\.[qv]_proj|[12]\.mlp\.down_proj)"
    },
}


# Everything on the one, and on the other what depends on the family.
CASES = [
    *(pytest.param("llama, biases", settings, id=name) for name, settings in SETTINGS.items()),
    pytest.param("gemma", SETTINGS["rslora"], id="gemma, rslora"),
    pytest.param("gemma", SETTINGS["regex, some layers"], id="gemma, regex, some layers"),
    # With "all-linear", peft would adapt the experts of OLMoE too, which we refuse.
    pytest.param(
        "olmoe", {"target_modules": r"model\.layers\.[02]\.self_attn\.[qo]_proj"}, id="olmoe"
    ),
    pytest.param(
        "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, id="gpt2"
    ),
]


class Base(NamedTuple):
    path: Path
    logits: np.ndarray


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    found = {}
    for name in ("llama, biases", "gemma", "olmoe", "gpt2"):
        path = tmp_path_factory.mktemp("base") / "model"
        build(CONFIGS[name]).save_pretrained(path)
        found[name] = Base(path, ours(path))
    return found


def adapted(path, **settings):
    """PEFT's model on a base model, with random A and B."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, **settings)
    model = peft.get_peft_model(reload(path), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def ours(*arguments, **named):
    return logits_of(load_pretrained(*arguments, **named), TOKENS)


def read(path):
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_import_and_export(tmp_path, bases, name, settings):
    base, plain = bases[name]
    theirs = adapted(base, **settings)
    theirs.save_pretrained(tmp_path / "a")
    wanted = torch_logits(theirs, TOKENS)
    model = load_pretrained(tmp_path / "a")
    got = logits_of(model, TOKENS)
    assert relative_error(got, wanted) <= 1e-5
    assert relative_error(plain, wanted) > 0.01

    export_pretrained(model, tmp_path / "b", "peft", tmp_path / "a")
    # Missing and unexpected keys are warnings, which are errors here.
    again = peft.PeftModel.from_pretrained(reload(base), tmp_path / "b").eval()
    np.testing.assert_array_equal(torch_logits(again, TOKENS), wanted)
    names = [
        {name for name, _ in model.named_parameters() if "lora_" in name}
        for model in (theirs, again)
    ]
    assert names[0] == names[1]
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    config = peft.PeftConfig.from_pretrained(tmp_path / "b")
    assert config.base_model_name_or_path == str(base)
    assert config.inference_mode


@pytest.mark.parametrize(
    ("name", "rslora"), [("llama, biases", True), ("gemma", False)], ids=["rslora", "gemma"]
)
def test_our_own_adapters(tmp_path, bases, name, rslora):
    base, plain = bases[name]
    lora = LoraConfig(rank=4, alpha=3.0, targets=("mlp.up_proj", "o_proj"), use_rslora=rslora)
    model = load_pretrained(base, LizaConfig(writes="all"), lora)
    rng = np.random.default_rng(0)
    for stack in model.stacks:
        for projection in (stack.mlp.up_proj, stack.self_attn.o_proj):
            shape = projection.lora.b[...].shape
            projection.lora.b[...] = jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)
    wanted = logits_of(model, TOKENS, use_memory=False)
    export_pretrained(model, tmp_path / "b", "peft", base)
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["target_modules"] == [
        *("o_proj", "up_proj")
    ]
    theirs = peft.PeftModel.from_pretrained(reload(base), tmp_path / "b").eval()
    assert relative_error(torch_logits(theirs, TOKENS), wanted) <= 1e-5
    assert relative_error(ours(tmp_path / "b"), wanted) <= 1e-6
    assert relative_error(plain, wanted) > 0.01


def test_half_precision_adapters(tmp_path, bases):
    base, _ = bases["llama, biases"]
    adapted(base, target_modules=ATTENTION).to(torch.bfloat16).save_pretrained(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(reload(base), tmp_path / "a").eval()
    assert relative_error(ours(tmp_path / "a"), torch_logits(theirs, TOKENS)) <= 1e-5


def test_merged_by_peft(tmp_path, bases):
    """What our refusals advise: peft merges, and we load the result."""
    theirs = adapted(bases["llama, biases"].path, target_modules=EVERY, use_dora=True)
    wanted = torch_logits(theirs, TOKENS)
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert relative_error(ours(tmp_path / "merged"), wanted) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
# It says each time that it saves the embedding.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_embeddings_that_peft_saves(tmp_path, tied, capsys):
    config = transformers.LlamaConfig(
        **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied},
    )
    base = str(tmp_path / "base")
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for name, rows in (("equal", 61), ("resized", 64)):
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(rows)
        adapted = peft.get_peft_model(model, lora)
        adapted.save_pretrained(str(tmp_path / name), save_embedding_layers=rows == 61 or "auto")
        assert any("embed_tokens" in each for each in load_file(adapter_file(tmp_path / name)))
    assert load_pretrained(base, adapter=tmp_path / "equal").lora.rank == 2
    assert "copy of the base model's" in capsys.readouterr().err
    with pytest.raises(ConversionError, match=r"resized .*resize_token_embeddings\(64\)"):
        load_pretrained(base, adapter=tmp_path / "resized")


def adapter_file(path):
    return path / "adapter_model.safetensors"
