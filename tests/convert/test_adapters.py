import contextlib
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import ConversionError, export_pretrained, load_pretrained
from convert.__main__ import main
from convert.adapters import fit_adapter, open_adapter
from convert.adapters.config import matches
from convert.adapters.export import target_modules
from convert.bases import resolve_base
from convert.families import family_of
from convert.loading import variables_of
from convert.rules import IDENTITY, TRANSPOSE, Rule
from convert.sources import open_pretrained
from tests.contracts import logits_of, random_tokens
from tests.convert.checkpoints import LLAMA, hf_shapes, random_tensors, write_directory
from tests.convert.test_gguf_io import write_gguf
from tptt_jax import LizaConfig, LoraConfig
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, init_train_state, make_train_step

RANK = 3
# Inputs and outputs of the projections of LLAMA, from its sizes.
SIZES = {
    **{"self_attn.q_proj": (36, 40), "self_attn.k_proj": (36, 20), "self_attn.v_proj": (36, 20)},
    **{"self_attn.o_proj": (40, 36), "mlp.gate_proj": (36, 44), "mlp.up_proj": (36, 44)},
    "mlp.down_proj": (44, 36),
}
CONFIG = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True},
    **{"r": RANK, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False},
    **{"target_modules": ["q_proj", "down_proj"], "modules_to_save": None, "rank_pattern": {}},
    **{"init_lora_weights": True, "megatron_core": "megatron.core", "peft_version": "0.21.2"},
}


def adapter_tensors(*places: str, rank: int = RANK) -> dict[str, np.ndarray]:
    """Random tensors of PEFT's names, e.g. for "0.self_attn.q_proj"."""
    rng = np.random.default_rng(0)
    tensors = {}
    for place in places:
        inputs, outputs = SIZES[place.split(".", 1)[1]]
        name = f"base_model.model.model.layers.{place}"
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = (0.3 * rng.standard_normal(shape)).astype(np.float32)
            tensors[f"{name}.lora_{part}.weight"] = values
    return tensors


PLACES = [f"{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]


def write_adapter_files(path, tensors=None, **changes):
    path.mkdir(exist_ok=True)
    tensors = adapter_tensors(*PLACES) if tensors is None else tensors
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("base") / "llama", LLAMA)


@pytest.fixture
def adapter(tmp_path, llama):
    return write_adapter_files(tmp_path / "adapter", base_model_name_or_path=str(llama))


def lora_values(model):
    return {
        name: np.asarray(variable.get_value())
        for name, (_, variable) in variables_of(model).items()
        if ".lora." in name
    }


def read_tensors(path):
    return load_file(path / "adapter_model.safetensors")


def read_settings(path):
    return json.loads((path / "adapter_config.json").read_text())


def fit(path, base):
    return fit_adapter(open_adapter(path), open_pretrained(base).config)


def test_every_tensor_is_in_its_place(adapter):
    model = load_pretrained(adapter)
    assert model.lora == LoraConfig(rank=3, alpha=6.0, dropout=0.1, targets=("q_proj", "down_proj"))
    values, tensors = lora_values(model), adapter_tensors(*PLACES)
    assert len(values) == 4
    for place in PLACES:
        layer, name = place.split(".", 1)
        for ours, theirs in (("a", "A"), ("b", "B")):
            stored = tensors[f"base_model.model.model.layers.{place}.lora_{theirs}.weight"]
            value = values[f"stacks.0.{name}.lora.{ours}"][int(layer)]
            np.testing.assert_array_equal(value, stored.T)


def test_the_same_as_merged_weights(tmp_path, adapter, llama):
    tokens = random_tokens((2, 9), seed=1)
    weights = load_file(llama / "model.safetensors")
    tensors = adapter_tensors(*PLACES)
    for place in PLACES:
        a, b = (tensors[f"base_model.model.model.layers.{place}.lora_{x}.weight"] for x in "AB")
        weights[f"model.layers.{place}.weight"] += 6 / math.sqrt(RANK) * b @ a
    wanted = logits_of(load_pretrained(write_directory(tmp_path / "m", LLAMA, weights)), tokens)
    write_adapter_files(adapter, use_rslora=True, base_model_name_or_path=str(llama))
    got = logits_of(load_pretrained(adapter), tokens)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_memory_beside_an_adapter(adapter):
    model = load_pretrained(adapter, LizaConfig(softmax_window=5))
    assert model.liza is not None
    jax.tree.map(
        np.testing.assert_array_equal, lora_values(model), lora_values(load_pretrained(adapter))
    )


def test_names_with_default(tmp_path, llama):
    tensors = {
        name.replace(".weight", ".default.weight"): value
        for name, value in adapter_tensors(*PLACES).items()
    }
    path = write_adapter_files(tmp_path / "a", tensors)
    plain = write_adapter_files(tmp_path / "b")
    values = [lora_values(load_pretrained(llama, adapter=each)) for each in (path, plain)]
    jax.tree.map(np.testing.assert_array_equal, *values)
    write_adapter_files(path, tensors | adapter_tensors(PLACES[0]))
    with pytest.raises(ConversionError, match=r"0\.self_attn\.q_proj\.lora_A\.weight, .* twice"):
        open_adapter(path)


@pytest.mark.parametrize(
    ("changes", "selected"),
    [
        ({"target_modules": "all-linear"}, set(SIZES)),
        ({"target_modules": ["mlp.up_proj", "nothing"]}, {"mlp.up_proj"}),
        ({"target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(3)]}, {"mlp.up_proj"}),
        ({"target_modules": r".*_proj", "exclude_modules": r".*mlp.*"}, {*list(SIZES)[:4]}),
        (
            {"target_modules": ["k_proj", "v_proj"], "exclude_modules": ["k_proj"]},
            {*[list(SIZES)[2]]},
        ),
        ({"target_modules": r"model\.layers\.\d\.mlp\.(gate|up)_proj"}, {*list(SIZES)[4:6]}),
    ],
    ids=["all-linear", "list", "whole names", "excluded", "excluded names", "regex"],
)
def test_target_modules(tmp_path, llama, changes, selected):
    tensors = adapter_tensors(*(f"{i}.{name}" for i in range(3) for name in selected))
    fitted = fit(write_adapter_files(tmp_path / "a", tensors, **changes), llama)
    assert {place.target for place in fitted.places} == selected
    assert {path for path in SIZES if fitted.lora.matches(path)} == selected


PARTIAL = r"model\.layers\.(0\.self_attn\.q_proj|2\.mlp\.up_proj)"


def test_some_layers_only(tmp_path, llama):
    tensors = adapter_tensors("0.self_attn.q_proj", "2.mlp.up_proj")
    path = write_adapter_files(tmp_path / "a", tensors, target_modules=PARTIAL)
    model = load_pretrained(llama, adapter=path)
    values = lora_values(model)
    assert not values["stacks.0.self_attn.q_proj.lora.a"][1:].any()
    assert not values["stacks.0.self_attn.q_proj.lora.b"][1:].any()
    assert values["stacks.0.mlp.up_proj.lora.b"][2].all()
    export_pretrained(model, tmp_path / "b", "peft", llama)
    assert read_tensors(tmp_path / "b").keys() == tensors.keys()
    for name, value in read_tensors(tmp_path / "b").items():
        np.testing.assert_array_equal(value, tensors[name])


def test_layers_without_an_adapter_stay_so_in_training(tmp_path, llama):
    tensors = adapter_tensors("0.self_attn.q_proj", "2.mlp.up_proj")
    path = write_adapter_files(tmp_path / "a", tensors, target_modules=PARTIAL)
    model = load_pretrained(llama, adapter=path)
    before = lora_values(model)
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), 2, partition)
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (1, 9)), jnp.int32)
    batch = Batch(
        tokens=tokens, segment_ids=jnp.ones_like(tokens), loss_mask=jnp.ones(tokens.shape, bool)
    )
    step = make_train_step(partition, optimizer, mag_schedule=None)
    for _ in range(2):
        state, _ = step(state, partition.frozen, batch)
    changed = {
        name: [not np.array_equal(x, y) for x, y in zip(before[name], value, strict=True)]
        for name, value in state.trainable.items()
    }
    assert changed == {
        **{f"stacks.0.self_attn.q_proj.lora.{part}": [True, False, False] for part in "ab"},
        **{f"stacks.0.mlp.up_proj.lora.{part}": [False, False, True] for part in "ab"},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "lacks peft_type"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"setting_of_the_future": 3}, "setting_of_the_future = 3"),
        (
            {"use_dora": True, "lora_bias": True},
            "lora_bias = True, use_dora = True; peft can merge",
        ),
        ({"target_modules": None}, "names nothing"),
        ({"target_modules": []}, "names nothing"),
        ({"target_modules": [3]}, "must be a list of strings"),
        ({"target_modules": "q_proj("}, "not a valid regular expression"),
        (
            {"target_modules": ["c_attn"]},
            r"selects none of the projections .* \(self_attn\.q_proj,",
        ),
        ({"r": 0}, "rank must be at least 1"),
        ({"r": 10**30}, "at most 2147483647"),
        ({"r": "8"}, "r in .* must be an integer"),
        ({"lora_alpha": math.inf}, "lora_alpha in .* must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha in .* must be a finite number"),
        ({"lora_dropout": 1.0}, "dropout must lie in"),
        ({"use_rslora": "yes"}, "true or false"),
    ],
    ids=lambda x: json.dumps(x)[:40] if isinstance(x, dict) else "",
)
def test_settings_that_are_refused(tmp_path, llama, changes, message):
    with pytest.raises(ConversionError, match=message):
        fit(write_adapter_files(tmp_path / "a", **changes), llama)


def test_problems_are_all_listed(tmp_path, llama):
    tensors = adapter_tensors(*PLACES)
    name = "base_model.model.model.layers.{}.lora_{}.weight".format
    tensors["strange"] = tensors.pop(name(PLACES[0], "A"))
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 36), np.float32)
    tensors[name(PLACES[3], "B")] = np.zeros((36, 4), np.float32)
    with pytest.raises(ConversionError) as caught:
        fit(write_adapter_files(tmp_path / "a", tensors), llama)
    assert str(caught.value).endswith(
        "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; "
        "unexpected: base_model.model.lm_head.lora_A.weight, strange; "
        "misshapen: base_model.model.model.layers.1.mlp.down_proj.lora_B.weight [36, 4] instead of "
        "[36, 3]."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_all_invalid_tensors_are_named(tmp_path, llama, value):
    tensors = adapter_tensors(*PLACES)
    for place in (PLACES[1], PLACES[2]):
        tensors[f"base_model.model.model.layers.{place}.lora_B.weight"][2, 1] = value
    path = write_adapter_files(tmp_path / "a", tensors)
    with pytest.raises(ConversionError, match=r"0\.mlp\.down.*lora_B.*1\.self_attn\.q.*lora_B"):
        load_pretrained(llama, adapter=path)


def test_pickles_are_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConversionError, match=r"pickle .*save_pretrained\(OTHER_DIR\)"):
        load_pretrained(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ConversionError, match=r"adapter_model\.safetensors cannot be read"):
        load_pretrained(adapter)


def test_a_directory_that_is_no_adapter(tmp_path, llama, adapter):
    with pytest.raises(ConversionError, match=r"llama has no adapter_config\.json"):
        load_pretrained(llama, adapter=llama)
    with pytest.raises(ConversionError, match="is an adapter itself"):
        load_pretrained(adapter, adapter=adapter)
    description = Description(source=str(llama), liza=None, lora=LoraConfig(), train="lora")
    write_description(tmp_path / "run", description)
    with pytest.raises(ConversionError, match="does not take a PEFT adapter"):
        load_pretrained(tmp_path / "run", adapter=adapter)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not name its base model"),
        ("", "does not name its base model"),
        ("/nowhere/model", "'/nowhere/model' as its base model, which does not exist here"),
        ("./model", "relative to an unknown folder"),
        ("a/b/c", "relative to an unknown folder"),
        ("local", "relative to an unknown folder"),
        ("/nul\0l", "does not exist here"),
        ("/" + "a" * 5000, "does not exist here"),
        ("a" * 5000, "relative to an unknown folder"),
        ("someone/some-model", "could not be fetched from the Hugging Face hub"),
    ],
    ids=lambda x: str(x)[:20].replace("\0", ""),
)
def test_base_models_that_are_not_found(tmp_path, llama, adapter, monkeypatch, base, message):
    shutil.copytree(llama, tmp_path / "local")
    monkeypatch.chdir(tmp_path)
    write_adapter_files(adapter, base_model_name_or_path=base)
    with pytest.raises(ConversionError, match=message) as caught:
        load_pretrained(adapter)
    assert f"load_pretrained(BASE_MODEL, adapter='{adapter}')" in str(caught.value)
    assert load_pretrained(llama, adapter=adapter).lora is not None


EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equal_copies_of_the_embedding_are_passed_over(tmp_path, llama, dtype, capsys):
    base = load_file(llama / "model.safetensors")
    copies = {
        EMBEDDING: base["model.embed_tokens.weight"].astype(dtype),
        HEAD: base["lm_head.weight"].astype(dtype),
    }
    path = write_adapter_files(tmp_path / "a", adapter_tensors(*PLACES) | copies)
    plain = lora_values(load_pretrained(llama, adapter=write_adapter_files(tmp_path / "b")))
    capsys.readouterr()
    values = lora_values(load_pretrained(llama, adapter=path))
    for name, value in plain.items():
        np.testing.assert_array_equal(values[name], value)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "an identical copy of the base model's lm_head.weight, model.embed_tokens.weight" in said


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("rows", [97, 99], ids=["changed", "resized"])
def test_other_embeddings_are_refused(tmp_path, llama, name, rows):
    own = load_file(llama / "model.safetensors")[name.removeprefix("base_model.model.")]
    copy = np.concatenate([own, own])[:rows]
    copy[3, 5] += 1
    path = write_adapter_files(tmp_path / "a", adapter_tensors(*PLACES) | {name: copy})
    match = r"resized .* of 99 tokens, the base model has 97: .*resize_token_embeddings\(99\)"
    wanted = match if rows == 99 else r"changed .*Merge it first: .*merge_and_unload\(\)"
    with pytest.raises(ConversionError, match=wanted):
        load_pretrained(llama, adapter=path)


def test_a_copy_beside_a_quantised_base(tmp_path, llama):
    """Its own embedding is a rounded one, so a copy that nobody has touched differs from it."""
    tensors = random_tensors(hf_shapes(LLAMA))
    base = write_gguf(tmp_path / "a.gguf", LLAMA, tensors)
    copy = tensors["model.embed_tokens.weight"] + np.float32(1e-3)
    path = write_adapter_files(tmp_path / "a", adapter_tensors(*PLACES) | {EMBEDDING: copy})
    match = r"base is quantised \(.*a\.gguf\), so .* use the Hugging Face checkpoint of the base"
    with pytest.raises(ConversionError, match=match):
        load_pretrained(base, adapter=path)


def test_a_copy_of_a_tied_head(tmp_path, capsys):
    base = write_directory(tmp_path / "base", LLAMA | {"tie_word_embeddings": True})
    copy = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    path = write_adapter_files(tmp_path / "a", adapter_tensors(*PLACES) | {HEAD: copy})
    load_pretrained(base, adapter=path)
    assert "lm_head.weight" in capsys.readouterr().err
    write_adapter_files(path, adapter_tensors(*PLACES) | {HEAD: copy + 1})
    with pytest.raises(ConversionError, match=r"changed lm_head\.weight"):
        load_pretrained(base, adapter=path)


def test_a_base_model_of_a_revision(adapter, llama):
    write_adapter_files(adapter, base_model_name_or_path=str(llama), revision="abc")
    with pytest.raises(ConversionError, match="belongs to revision 'abc'"):
        load_pretrained(adapter)


def test_a_base_model_that_has_adapters(tmp_path, adapter, llama):
    other = write_adapter_files(tmp_path / "other", base_model_name_or_path=str(adapter))
    with pytest.raises(ConversionError, match="has adapters itself"):
        load_pretrained(other)


def test_adapters_come_from_the_hub_too(adapter, monkeypatch):
    patterns = []

    def snapshot(name, allow_patterns):
        patterns.extend(allow_patterns)
        return str(adapter)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_pretrained("someone/some-adapter").lora is not None
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(patterns)


@pytest.mark.parametrize(
    "changes",
    [{"rank": 4}, {"alpha": 5.0}, {"use_rslora": True}, {"targets": ("q_proj",)}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_than_the_adapter_s(adapter, changes):
    own = load_pretrained(adapter).lora
    assert load_pretrained(adapter, lora=dataclasses.replace(own, dropout=0.0)).lora.dropout == 0
    with pytest.raises(ConversionError) as caught:
        load_pretrained(adapter, lora=dataclasses.replace(own, **changes))
    assert str(caught.value).endswith(
        "--lora.rank 3 --lora.alpha 6 --lora.no-use-rslora --lora.targets q_proj down_proj."
    )


def test_round_trip(tmp_path, adapter, llama):
    export_pretrained(
        load_pretrained(adapter, LizaConfig(softmax_window=5)), tmp_path / "b", "peft", adapter
    )
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]
    first, second = read_tensors(adapter), read_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    with safe_open(tmp_path / "b/adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    wanted = {
        **{"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": False},
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": False},
        **{"target_modules": ["q_proj", "down_proj"], "inference_mode": True, "bias": "none"},
        "base_model_name_or_path": str(llama),
    }
    assert read_settings(tmp_path / "b").items() >= wanted.items()


def test_export_without_adapters(tmp_path, llama):
    with pytest.raises(ConversionError, match="no LoRA adapters"):
        export_pretrained(load_pretrained(llama), tmp_path / "b", "peft")
    assert not (tmp_path / "b").exists()


def test_export_replaces_an_earlier_adapter_only(tmp_path, adapter):
    model = load_pretrained(adapter)
    export_pretrained(model, tmp_path / "b", "peft")
    assert read_settings(tmp_path / "b")["base_model_name_or_path"] is None
    with pytest.raises(ConversionError, match="not empty"):
        export_pretrained(model, tmp_path / "b", "peft")
    export_pretrained(model, tmp_path / "b", "peft", overwrite=True)
    (tmp_path / "b/adapter_config.json").unlink()
    with pytest.raises(ConversionError, match="is not a model directory"):
        export_pretrained(model, tmp_path / "b", "peft", overwrite=True)


def test_resolve_base(tmp_path, adapter, llama, monkeypatch):
    description = Description(source=str(adapter), liza=None, lora=LoraConfig(), train="lora")
    write_description(tmp_path / "run", description)
    assert resolve_base(tmp_path / "run") == resolve_base(adapter) == str(llama)
    monkeypatch.chdir(llama.parent)
    assert resolve_base("llama") == str(llama)
    assert resolve_base("demo") == "demo"
    hub = {"a/model": llama, "a/adapter": adapter}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(hub[name]))
    assert [resolve_base(name) for name in hub] == ["a/model", str(llama)]


MODULES = [
    f"h.{i}.{name}" for i in range(12) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
]


@pytest.mark.parametrize(
    ("adapted", "wanted"),
    [
        ([m for m in MODULES if m.endswith("c_attn")], ("c_attn",)),
        ([m for m in MODULES if m.endswith("c_proj")], ("c_proj",)),
        ([m for m in MODULES if "attn" in m], ("c_attn", "attn.c_proj")),
        (["h.1.mlp.c_proj"], r"h\.(?:1)(?:\.mlp\.c_proj)"),
        (
            ["h.1.mlp.c_proj", "h.1.attn.c_attn", "h.11.mlp.c_proj", "h.11.attn.c_attn"],
            r"h\.(?:1|11)(?:\.mlp\.c_proj|\.attn\.c_attn)",
        ),
        (
            ["h.1.mlp.c_proj", "h.2.attn.c_attn"],
            r"h\.(?:1)(?:\.mlp\.c_proj)|h\.(?:2)(?:\.attn\.c_attn)",
        ),
    ],
)
def test_names_or_one_expression(adapted, wanted):
    found = target_modules(adapted, set(MODULES) - set(adapted) | {"wte", "lm_head", "h.0.ln_1"})
    assert found == wanted
    assert [module for module in MODULES if matches(found, module)] == sorted(
        adapted, key=MODULES.index
    )


def test_layers_of_different_widths(tmp_path, shared_dir):
    """OpenELM's layers lie in several stacks; layer 0 has no adapter, whatever stack it is in."""
    base = shared_dir / "golden" / "openelm_tied"
    lora = LoraConfig(rank=2, targets=("qkv_proj", "o_proj", "down_proj"))
    model = load_pretrained(base, lora=lora)
    stacks = {name.split(".")[1] for name in lora_values(model)}
    assert len(stacks) > 1
    export_pretrained(model, tmp_path / "a", "peft", base)
    found = read_settings(tmp_path / "a")
    assert found["target_modules"] == ["qkv_proj", "out_proj", "proj_2"]
    name = "base_model.model.transformer.layers.0."
    tensors = {k: v for k, v in read_tensors(tmp_path / "a").items() if not k.startswith(name)}
    layers = {k.split(".")[4] for k in tensors}
    targets = rf"transformer\.layers\.({'|'.join(layers)})\..*(qkv_proj|out_proj|proj_2)"
    changes = {"target_modules": targets, "r": 2}
    again = load_pretrained(base, adapter=write_adapter_files(tmp_path / "b", tensors, **changes))
    export_pretrained(again, tmp_path / "c", "peft", base)
    assert read_tensors(tmp_path / "c").keys() == tensors.keys()
    for name, value in read_tensors(tmp_path / "c").items():
        np.testing.assert_array_equal(value, tensors[name])


@pytest.mark.parametrize("transform", [IDENTITY, TRANSPOSE], ids=["conv1d", "linear"])
def test_the_layout_of_the_base_weights(tmp_path, llama, monkeypatch, transform):
    """GPT-2 stores its weights [in, out], which PEFT calls fan_in_fan_out."""
    model = load_pretrained(llama, lora=LoraConfig(rank=2, targets=("q_proj",)))
    rule = Rule("h.{layer}.attn.c_attn.weight", "layers.{layer}.self_attn.q_proj.kernel", transform)
    family = dataclasses.replace(family_of("llama"), rules=lambda config: (rule,))
    monkeypatch.setattr("convert.adapters.export.family_of", lambda name: family)
    monkeypatch.setattr("convert.adapters.places.family_of", lambda name: family)
    export_pretrained(model, tmp_path / "b", "peft")
    found = read_settings(tmp_path / "b")
    assert found["fan_in_fan_out"] == (transform is IDENTITY)
    assert found["target_modules"] == ["c_attn"]
    # Adapters are stored the same way for either.
    a = read_tensors(tmp_path / "b")["base_model.model.h.1.attn.c_attn.lora_A.weight"]
    np.testing.assert_array_equal(a.T, lora_values(model)["stacks.0.self_attn.q_proj.lora.a"][1])


def test_projections_that_peft_cannot_hold(tmp_path, llama, monkeypatch):
    model = load_pretrained(llama, lora=LoraConfig(rank=2, targets=("gate_proj", "q_proj")))
    rules = [rule for rule in family_of("llama").rules(model.config) if "gate" not in rule.source]
    family = dataclasses.replace(family_of("llama"), rules=lambda config: tuple(rules))
    monkeypatch.setattr("convert.adapters.places.family_of", lambda name: family)
    with pytest.raises(ConversionError, match=r"stacks\.0\.mlp\.gate_proj have adapters"):
        export_pretrained(model, tmp_path / "b", "peft")


@given(chosen=st.sets(st.sampled_from(MODULES), min_size=1))
def test_exactly_these_modules(chosen):
    found = target_modules(sorted(chosen), set(MODULES) - chosen)
    assert {module for module in MODULES if matches(found, module)} == chosen


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments), "--json"])
    status, captured = main(), capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]) if status == 0 else captured.err


def test_command_line(tmp_path, adapter, llama, monkeypatch, capsys):
    found = run_main(monkeypatch, capsys, "inspect", adapter)
    assert found["format"] == "peft"
    assert (found["base"], found["rank"], found["tensors"]) == (str(llama), 3, 12)
    output = tmp_path / "out"
    arguments = ("export", adapter, "--output", output, "--format", "peft")
    assert run_main(monkeypatch, capsys, *arguments)["dtype"] == "float32"
    assert read_tensors(output).keys() == read_tensors(adapter).keys()
    merged = tmp_path / "merged"
    run_main(monkeypatch, capsys, "export", adapter, "--output", merged)
    assert load_pretrained(merged).lora is None
    error = run_main(monkeypatch, capsys, "export", llama, "--output", output, "--format", "peft")
    assert error.startswith("error: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from([*CONFIG, "use_rslora", "exclude_modules", "base_model_name_or_path"])
FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@pytest.mark.filterwarnings("ignore:Possible (nested set|set difference):FutureWarning")
@given(changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_damaged_settings(adapter, llama, changes):
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    with contextlib.suppress(ConversionError):
        fit(adapter, llama)


@FUZZ
@given(data=st.data())
def test_damaged_files(adapter, llama, data):
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    original = (adapter / name).read_bytes()
    # Most of the weights' file is data, in which nothing can be noticed.
    end = min(len(original), 3000)
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, end - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    (adapter / name).write_bytes(damaged)
    with contextlib.suppress(ConversionError):
        fit(adapter, llama)
    (adapter / name).write_bytes(original)
