"""Damaged and malicious inputs: readers refuse them quickly, in one sentence.

Anything but ValueError and OSError is a bug: the commands turn those two into one line.
"""

import copy
import functools
import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import transformers
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert import ConversionError, load_pretrained, load_tokenizer
from convert.families import FAMILIES
from convert.formats import GgufFile
from convert.sources import find_checkpoint, open_pretrained
from convert.sources.opening import read_config
from tests.convert.checkpoints import GEMMA, LLAMA, hf_shapes, random_tensors, write_directory
from tests.convert.test_gguf_io import write_gguf
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import MAX_LAYERS
from tptt_jax.training.description import Description, write_description

FUZZ = settings(max_examples=100, deadline=None, derandomize=True)

HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 10**9, 10**12, 10**400, -(10**30), 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "none", "default", "\0", "é" * 50),
    *([], [0], [1, "a"], [[[]]], [None] * 3, {}, {"x": 1}, {"rope_type": []}),
    *({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear"}, {"type": 3}),
    {"rope_type": "llama3", "factor": 0, "low_freq_factor": 4, "high_freq_factor": 4},
    {"full_attention": {"rope_type": "linear", "factor": "x"}, "sliding_attention": 1},
]
EXTRA_KEYS = ["rope_scaling", "rope_parameters", "layer_types", "head_dim", "sliding_window"]
SMALL = {
    **{"num_hidden_layers": 2, "n_layer": 2, "hidden_size": 32, "n_embd": 32, "vocab_size": 64},
    **{"num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "layer_types": None},
}


def answers(function, *arguments) -> Any:
    """The result, or None if the input was refused in a sentence."""
    refusal = "unused"
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        refusal = str(error).strip()
        return None
    finally:
        assert refusal
        assert "\n" not in refusal


@functools.cache
def example(model_type: str) -> dict[str, Any]:
    """A small config.json of the family; only its type where transformers lacks the family."""
    known = {config["model_type"]: config for config in (LLAMA, GEMMA)}
    if model_type in known:
        return known[model_type]
    if model_type not in transformers.CONFIG_MAPPING:
        return {"model_type": model_type, **SMALL}
    full = transformers.CONFIG_MAPPING[model_type]().to_dict()
    return full | {key: value for key, value in SMALL.items() if key in full}


def mutate(data: st.DataObject, content: Any, depth: int = 0) -> Any:
    """Replaces, removes or adds a few values, at any depth."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if isinstance(place, dict):
                keys += [key for key in EXTRA_KEYS if place is content and key not in place]
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            below = place.get(key) if isinstance(place, dict) else place[key]
            if isinstance(below, dict | list) and below and data.draw(st.booleans()):
                place = below
                continue
            if isinstance(place, dict) and key in place and data.draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
            break
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory without weights of use, so that whatever is accepted must be refused later."""
    path = tmp_path_factory.mktemp("model")
    useless = {f"x{number}": np.zeros(2, np.float32) for number in range(100)}
    save_file(useless, path / "model.safetensors")
    return path


def check_config(folder, content) -> None:
    (folder / "config.json").write_text(json.dumps(content))
    found = answers(read_config, folder)
    if found is not None:
        family, config, _ = found
        family.rules(config)
        assert config.num_layers <= MAX_LAYERS
        assert all(map(math.isfinite, (config.attention_scale, config.norm.eps)))


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_every_key_with_every_value(folder, model_type):
    config = example(model_type)
    for key in dict.fromkeys([*config, *EXTRA_KEYS]):
        for value in HOSTILE:
            check_config(folder, config | {key: value})


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_configs(folder, model_type):
    @FUZZ
    @given(st.data())
    def run(data):
        check_config(folder, mutate(data, example(model_type)))

    run()


@pytest.mark.parametrize("model_type", list(FAMILIES))
@pytest.mark.parametrize("value", [10**9, 10**18], ids=["billions", "trillions"])
def test_absurd_sizes(folder, model_type, value):
    config = example(model_type)
    for key in [key for key, each in config.items() if type(each) is int]:
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        # Refused by the configuration, or because the weights are not there.
        assert answers(load_pretrained, folder) is None


@FUZZ
@given(st.data())
def test_json_text(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "text"
    path.mkdir(exist_ok=True)
    text = json.dumps(LLAMA).encode()
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 8)))
    pieces = [b"", b"{", b"[" * 100_000, b"1" * 5000, b"\xff", b"NaN", b'"a":1,"a":2,', b"\0"]
    piece = data.draw(st.sampled_from(pieces) | st.binary(max_size=4))
    (path / "config.json").write_bytes(text[:begin] + piece + text[end:])
    answers(read_config, path)


@FUZZ
@given(st.data())
def test_indexes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "index"
    if not path.exists():
        write_directory(path, LLAMA)
        (path / "model.safetensors").rename(path / "a.safetensors")
    names = list(hf_shapes(LLAMA))
    index = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    hostile = ["..", "/etc/passwd", "", ".", "a.safetensors/", "x" * 300, "a.safetensors\0", "."]
    if data.draw(st.booleans()):
        index["weight_map"][names[0]] = data.draw(st.sampled_from(hostile))
    else:
        index = mutate(data, index)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    answers(load_pretrained, path)


def header_of(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {
            **{"dtype": "F32", "shape": list(array.shape), "data_offsets": [position, end]}
        }
        position = end
    return header


@FUZZ
@given(st.data())
def test_safetensors_headers(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "headers"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA))
    tensors = random_tensors(hf_shapes(LLAMA))
    header = json.dumps(mutate(data, header_of(tensors))).encode()
    length = data.draw(st.sampled_from([len(header), 0, 7, 2**40, 2**64 - 1, len(header) + 9]))
    body = b"".join(array.tobytes() for array in tensors.values())
    content = length.to_bytes(8, "little") + header + body
    (path / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    answers(load_pretrained, path)


@pytest.fixture(scope="module", params=[LLAMA, GEMMA], ids=["llama", "gemma"])
def gguf_model(request, tmp_path_factory):
    tensors = random_tensors(hf_shapes(request.param))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", request.param, tensors)


def test_every_gguf_key_with_every_value(gguf_model, monkeypatch):
    file = GgufFile(gguf_model)
    monkeypatch.setattr("convert.sources.opening.GgufFile", lambda path: file)
    original = dict(file.metadata)
    architecture = original["general.architecture"]
    extra = ("rope.scaling.type", "rope.scaling.factor", "rope.dimension_count")
    assert answers(open_pretrained, gguf_model) is not None
    for key in [*original, *(f"{architecture}.{name}" for name in extra)]:
        for value in HOSTILE:
            file.metadata = original | {key: value}
            answers(open_pretrained, gguf_model)


@FUZZ
@given(st.data())
def test_gguf_headers(gguf_model, data):
    content = bytearray(gguf_model.read_bytes())
    # The metadata come first; lengths and counts are eight bytes each.
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, 3000))
        piece = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\xff", b"\0" * 7 + b"\x80"]))
        content[begin : begin + len(piece)] = piece
    path = gguf_model.with_name("damaged.gguf")
    path.write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    found = answers(open_pretrained, path)
    if found is not None:
        answers(load_pretrained, path)


@settings(FUZZ, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_tokenizers(tiny_model_dir, tmp_path, data):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    for each in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / each, tmp_path / each)
    text = (tmp_path / name).read_bytes()
    if data.draw(st.booleans()):
        (tmp_path / name).write_bytes(text[: data.draw(st.integers(0, len(text)))])
    else:
        (tmp_path / name).write_text(json.dumps(mutate(data, json.loads(text))))
    answers(load_tokenizer, tmp_path)


def test_checkpoint_descriptions(tmp_path):
    base = write_directory(tmp_path / "base", LLAMA)
    description = Description(
        source=str(base), liza=LizaConfig(softmax_window=5), lora=LoraConfig(), train="lora"
    )
    good = json.loads(description.to_json())
    path = tmp_path / "run"
    path.mkdir()

    accepted = []

    def check(content):
        (path / "checkpoint.json").write_text(json.dumps(content))
        found = answers(find_checkpoint, path)
        if found is not None:
            accepted.append(found)

    for key in good:
        for value in HOSTILE:
            check(good | {key: value})
    for part in ("liza", "lora"):
        for key in [*good[part], "unknown"]:
            for value in HOSTILE:
                check(good | {part: good[part] | {key: value}})
    assert len(accepted) > 50

    def build(found):
        return CausalLM(ModelConfig.tiny(), found.liza, found.lora, rngs=nnx.Rngs(0))

    for found in accepted[:: len(accepted) // 20]:
        answers(nnx.eval_shape, functools.partial(build, found))


def test_a_checkpoint_of_itself(tmp_path):
    description = Description(source=str(tmp_path), liza=None, lora=None, train="full")
    write_description(tmp_path, description)
    for function in (load_pretrained, load_tokenizer, find_checkpoint):
        with pytest.raises(ConversionError, match="leads back to itself"):
            function(tmp_path)
