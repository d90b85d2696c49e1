"""Directories of the package tptt 0.12.1, both ways, against the package itself."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import ConversionError, export_pretrained, load_pretrained
from convert.__main__ import inspect_model, main
from convert.loading import variables_of
from convert.tptt import read_tptt_config
from tests.contracts import logits_of, relative_error
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.training.checkpoint import RunCheckpoints
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import TrainState

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tptt = pytest.importorskip("tptt")

pytestmark = [
    pytest.mark.parity,
    # The package's wrapper reads a property that transformers 5 deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24))
SETTINGS = {
    **{"operator_mode": "delta_product", "mag_weight": 0.3, "max_chunk_size": 8},
    **{"cross_gate": True, "base_scale_attn": True, "use_linear_checkpoint": False},
}


def write_base(path, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"initializer_range": 0.3, "max_position_embeddings": 64},
        **{"tie_word_embeddings": True} | changes,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base")


def lora_json(**changes):
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    settings["target_modules"] = ["q_proj", "v_proj", "o_proj", "up_proj"]
    return peft.LoraConfig(**settings | changes).to_dict()


def theirs(base, lora=None, **changes):
    """A model of the package; its trained values are random."""
    config = tptt.TpttConfig(
        base_model_config=transformers.AutoConfig.from_pretrained(base),
        base_model_name=str(base),
        lora_config=lora,
        **SETTINGS | changes,
    )
    model = tptt.TpttModel(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


def logits(model):
    return logits_of(model, TOKENS)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A directory with adapters, and the logits of the model that was saved."""
    path = tmp_path_factory.mktemp("saved") / "adapters"
    model = theirs(base, lora_json())
    model.save_pretrained(str(path))
    return path, torch_logits(model)


def edited(path, target, **changes):
    shutil.copytree(path, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | changes))
    return target


def test_adapters(saved):
    path, wanted = saved
    model = load_pretrained(path)
    assert model.lora == LoraConfig(
        rank=3, alpha=5.0, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "up_proj")
    )
    assert model.liza == LizaConfig.tptt_reference(
        "delta_product", chunk_size=8, mag_init=0.3, cross_gate=True, linear_scale="projected"
    )
    assert relative_error(logits(model), wanted) <= 1e-4


def test_settings_of_every_mode(saved, tmp_path):
    for mode in tptt.TpttConfig.RECURRENT_MODES:
        path = edited(saved[0], tmp_path / mode, operator_mode=mode, max_self_attn_length=32)
        liza = read_tptt_config(path).liza
        assert liza.recurrence == LizaConfig(writes="all", operator=mode).recurrence
        assert (liza.softmax_window, liza.softmax_sinks) == (32, 0)


def test_weights_that_were_trained_themselves(base, tmp_path):
    model = theirs(base, operator_mode="gated_delta_rule")
    model.save_pretrained(str(tmp_path / "a"))
    ours = load_pretrained(tmp_path / "a")
    assert ours.lora is None
    assert relative_error(logits(ours), torch_logits(model)) <= 1e-4
    kernel = variables_of(ours)["stacks.0.self_attn.k_proj.kernel"][1].get_value()
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.base_attn.k_proj.weight"
    np.testing.assert_array_equal(kernel[1], stored[name].T)


def test_an_untied_head_stays(tmp_path):
    """from_pretrained of the package ties it, but the model that was saved did not have that."""
    base = write_base(tmp_path / "base", tie_word_embeddings=False)
    model = theirs(base, lora_json(target_modules="model.*base_attn.(k|v)_proj"))
    model.save_pretrained(str(tmp_path / "a"))
    ours = load_pretrained(tmp_path / "a")
    assert ours.lora.targets == ("k_proj", "v_proj")
    assert relative_error(logits(ours), torch_logits(model)) <= 1e-4


def test_rank_stabilised_adapters_of_some_layers(base, tmp_path):
    lora = lora_json(use_rslora=True, target_modules=r".*\.1\.self_attn\.base_attn\.q_proj")
    model = theirs(base, lora)
    model.save_pretrained(str(tmp_path / "a"))
    assert relative_error(logits(load_pretrained(tmp_path / "a")), torch_logits(model)) <= 1e-4


def test_the_base_model_in_a_folder_or_elsewhere(base, saved, tmp_path):
    path, wanted = saved
    parent = {"base_model_name": str(base.parent), "base_model_subfolder": "base"}
    assert (
        relative_error(logits(load_pretrained(edited(path, tmp_path / "a", **parent))), wanted)
        <= 1e-4
    )
    gone = edited(path, tmp_path / "b", base_model_name=str(tmp_path / "gone"))
    with pytest.raises(
        ConversionError, match=r"does not exist here; name the base model: .*adapter="
    ):
        load_pretrained(gone)
    assert relative_error(logits(load_pretrained(base, adapter=gone)), wanted) <= 1e-4
    hub = {"base_model_name": "org/model", "base_model_subfolder": "base"}
    with pytest.raises(ConversionError, match="in folder 'base' of org/model; fetch that"):
        load_pretrained(edited(path, tmp_path / "c", **hub))


def test_inspect(saved, base):
    said = inspect_model(str(saved[0]))
    assert (said["format"], said["base"], said["rank"]) == ("tptt", str(base), 3)


REFUSED = {
    "mode": ({"operator_mode": "mamba"}, "operator_mode 'mamba' in .* is unknown"),
    "bidirectional": ({"bidirectional": True}, "bidirectional = True .* is not supported"),
    "task": ({"model_task": "encoder"}, "model_task = 'encoder' .* is not supported"),
    "precision": ({"linear_precision": "int8"}, "linear_precision = 'int8'"),
    "modules": ({"target_modules_names": ["mlp"]}, "target_modules_names = .'mlp'. .* every layer"),
    "share": ({"mag_weight": 1.5}, "mag_init must lie between 0 and 1, got 1.5"),
    "chunk": ({"max_chunk_size": 0}, "chunk_size must be at least 1"),
    "trick": (
        {"operator_mode": None, "recurrent_config": {"order": 2, "trick": "derivative"}},
        "trick = 'derivative' .* must be dt or rot or rdt",
    ),
    "dora": ({"lora_config": {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 3,
                              "use_dora": True}}, "not supported: use_dora"),
    "rank": ({"lora_config": {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}},
             "misshapen: .*lora_A"),
    "adapters without settings": ({"lora_config": None}, "do not fit the base model.*unexpected"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_we_do_not_have_is_refused(saved, tmp_path, changes, message):
    path = edited(saved[0], tmp_path / "a", **changes)
    with pytest.raises(ConversionError, match=message):
        load_pretrained(path)


def test_damaged_weights(saved, tmp_path):
    path = edited(saved[0], tmp_path / "a")
    file = path / "adapter_model.safetensors"
    tensors, whole = load_file(file), file.read_bytes()
    name = next(name for name in tensors if "lora_B" in name)
    file.write_bytes(whole[:-7])
    with pytest.raises(ConversionError, match=r"adapter_model\.safetensors"):
        load_pretrained(path)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ConversionError, match=r"missing: .*lora_B"):
        load_pretrained(path)
    tensors[name][0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(ConversionError, match="NaN or infinite"):
        load_pretrained(path)
    file.unlink()
    with pytest.raises(ConversionError, match=r"adapter_model\.safetensors cannot be read"):
        load_pretrained(path)
    (path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConversionError, match=r"only as Python pickles \(adapter_model\.bin\)"):
        load_pretrained(path)


def load_theirs(path, monkeypatch, tmp_path):
    """As a user would, through the two files that name the installed package."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    return tptt.TpttModel.from_pretrained(str(path), trust_remote_code=True).eval()


def randomized(model):
    rng = np.random.default_rng(2)
    variables = list(variables_of(model).values())
    for _, variable in variables:
        if isinstance(variable, nnx.LoRAParam):
            value = 0.2 * rng.standard_normal(variable.get_value().shape)
            variable.set_value(jnp.asarray(value, jnp.float32))
    nnx.update(model, nnx.from_flat_state(variables))
    return model


def test_round_trip(saved, tmp_path, monkeypatch):
    path, wanted = saved
    export_pretrained(load_pretrained(path), tmp_path / "b", "tptt", source=path)
    assert (
        relative_error(torch_logits(load_theirs(tmp_path / "b", monkeypatch, tmp_path)), wanted)
        <= 1e-4
    )
    again = load_pretrained(tmp_path / "b")
    first = load_pretrained(path)
    assert (again.liza, again.lora) == (first.liza, first.lora)
    for name, (_, variable) in variables_of(first).items():
        np.testing.assert_array_equal(
            variables_of(again)[name][1].get_value(), variable.get_value()
        )


EXPORTS = {
    "three steps, no adapters": (
        LizaConfig.tptt_reference("gated_delta_product", num_householder=3, trick="combined"),
        None,
    ),
    "some adapters": (
        LizaConfig.tptt_reference(
            "delta_rule_gelu", mag_init=0.7, softmax_window=32, softmax_sinks=0
        ),
        LoraConfig(rank=2, alpha=3.5, targets=("k_proj", "mlp.down_proj")),
    ),
    "only memory": (LizaConfig.tptt_reference("delta_rule", softmax=False), LoraConfig(rank=2)),
}


@pytest.mark.parametrize(("liza", "lora"), EXPORTS.values(), ids=EXPORTS)
def test_exports_load_in_the_package(base, tmp_path, monkeypatch, liza, lora):
    """Weights that differ from the base model go along, whatever they are."""
    model = randomized(load_pretrained(base, liza, lora))
    for name in (
        *("stacks.0.self_attn.k_proj.kernel", "stacks.0.mlp_norm.weight"),
        *("embed.embedding", "final_norm.weight"),
    ):
        path, variable = variables_of(model)[name]
        nnx.update(
            model, nnx.from_flat_state([(path, variable.replace(variable.get_value() * 1.5))])
        )
    export_pretrained(model, tmp_path / "a", "tptt", source=base)
    wanted = logits(model)
    package = load_theirs(tmp_path / "a", monkeypatch, tmp_path)
    assert relative_error(torch_logits(package), wanted) <= 1e-4
    assert relative_error(logits(load_pretrained(tmp_path / "a")), wanted) <= 1e-4
    untouched = logits(load_pretrained(base, liza))
    assert relative_error(untouched, wanted) > 0.01


REFERENCE = LizaConfig.tptt_reference()
INEXPRESSIBLE = {
    "no memory": (None, "this model has no memory"),
    "another operator": (
        LizaConfig(writes="all"),
        'needs operator "tptt_reference".*delta_product',
    ),
    "mixing": (
        LizaConfig(writes="all", operator="tptt_reference"),
        'linear_scale = "match", mag = "learned"',
    ),
    "sinks": (dataclasses.replace(REFERENCE, softmax_window=8), "softmax_sinks with a softmax_win"),
    "own deltas": (dataclasses.replace(REFERENCE, memory_rank=2), "memory_rank"),
}


@pytest.mark.parametrize(("liza", "message"), INEXPRESSIBLE.values(), ids=INEXPRESSIBLE)
def test_what_the_package_cannot_express(base, tmp_path, liza, message):
    model = load_pretrained(base, liza)
    with pytest.raises(ConversionError, match=message):
        export_pretrained(model, tmp_path / "a", "tptt", source=base)
    assert not (tmp_path / "a").exists()


def test_an_export_needs_a_base_model(tmp_path):
    model = CausalLM(ModelConfig.tiny(), REFERENCE, rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match="holds no base model: give the source"):
        export_pretrained(model, tmp_path / "a", "tptt")


def test_the_command_exports_a_run_that_started_from_such_a_directory(
    saved, tmp_path, monkeypatch, capsys
):
    path = saved[0]
    model = randomized(load_pretrained(path))
    _, trainable, _ = split_trainable(model, "lora")
    state = TrainState(trainable, (), jnp.float32(0.25), jnp.int32(1), jax.random.key(0))
    run = tmp_path / "run"
    described = Description(source=str(path), liza=model.liza, lora=model.lora, train="lora")
    write_description(run, described)
    with RunCheckpoints(run) as checkpoints:
        checkpoints.save(state)
    out = tmp_path / "out"
    arguments = ["export", str(run), "--output", str(out), "--format", "tptt", "--json"]
    monkeypatch.setattr("sys.argv", ["convert", *arguments])
    assert main() == 0, capsys.readouterr().err
    ours, package = load_pretrained(out), load_theirs(out, monkeypatch, tmp_path)
    assert ours.liza.mag_init == 0.25
    assert relative_error(torch_logits(package), logits(ours)) <= 1e-4
    assert relative_error(logits(load_pretrained(run)), logits(ours)) <= 1e-6
