"""Keys of config.json without a value: null, or -1 for "none"."""

import json

import pytest
import transformers

from convert import ConversionError
from convert.families import FAMILIES
from convert.sources.opening import read_config
from tests.convert.checkpoints import LLAMA
from tests.convert.tiny_families import CONFIGS

ONE_PER_FAMILY = [name for name in CONFIGS if "," not in name]
# Where null is not the same as absent.
MEANING = {"sliding_window"}


def read(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)[1]


def raw_config(name):
    return json.loads(CONFIGS[name].to_json_string(use_diff=False))


def refusal_of(folder, raw):
    try:
        read(folder, raw)
    except ConversionError as error:
        return str(error)
    return None


def takes(name, key, value):
    """Whether the configuration class of transformers takes the value."""
    try:
        type(CONFIGS[name])(**raw_config(name) | {key: value})
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_null_is_absent_where_transformers_takes_it(tmp_path, name):
    raw = raw_config(name)
    tested = []
    for key in [*raw, "rope_scaling", "head_dim"]:
        if key == "model_type" or key in MEANING or not takes(name, key, None):
            continue
        absent = {each: value for each, value in raw.items() if each != key}
        try:
            wanted = read(tmp_path, absent)
        except ConversionError:
            # Only where the key decides what the others mean.
            continue
        assert read(tmp_path, raw | {key: None}) == wanted, key
        tested.append(key)
    assert {"pad_token_id", "eos_token_id"} <= set(tested)
    if name in ("llama", "olmo2"):
        assert {"num_key_value_heads", "rope_scaling", "head_dim"} <= set(tested)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_minus_one_for_none(tmp_path, name):
    raw = raw_config(name)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert takes(name, key, -1)
        assert read(tmp_path, raw | {key: -1}) == read(tmp_path, raw | {key: None})
    assert read(tmp_path, raw | {"eos_token_id": [5, -1]}).eos_token_ids == (5,)
    assert read(tmp_path, raw | {"eos_token_id": [-1]}).eos_token_ids == ()
    if "max_position_embeddings" in raw:
        found = read(tmp_path, raw | {"max_position_embeddings": -1})
        assert (
            found.max_positions
            == read(tmp_path, raw | {"max_position_embeddings": None}).max_positions
        )


def test_null_means_no_window_in_mistral(tmp_path):
    """Left out it means 4096, as in transformers."""
    raw = raw_config("mistral")
    assert read(tmp_path, raw | {"sliding_window": None}).sliding_window is None
    del raw["sliding_window"]
    wanted = transformers.MistralConfig().sliding_window
    assert read(tmp_path, raw).sliding_window == wanted == 4096


@pytest.mark.parametrize("model_type", FAMILIES)
def test_values_of_a_wrong_type_are_one_line(tmp_path, model_type):
    name = model_type if model_type in CONFIGS else None
    raw = raw_config(name) if name else LLAMA | {"model_type": model_type}
    for key in ("num_key_value_heads", "head_dim", "vocab_size", "pad_token_id", "eos_token_id"):
        for value in ("4", 1.5, {}, [[]], [None], -7 if "token" not in key else {"a": 1}):
            refusal = refusal_of(tmp_path, raw | {key: value})
            if refusal is None:
                # Not a key of this family.
                assert key not in raw or model_type == "openelm"
            else:
                assert "\n" not in refusal
                assert str(tmp_path) in refusal


DEEP = "[" * 10_000 + "]" * 10_000
MIDDLE = '{"a":' * 300 + "1" + "}" * 300


@pytest.mark.parametrize("deep", [DEEP, MIDDLE], ids=["10,000", "300"])
def test_json_that_is_nested_deeply(tmp_path, deep):
    text = json.dumps(LLAMA)[:-1] + f', "x": {deep}, "vocab_size": {deep}}}'
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 97', '"y": 1'))
    with pytest.raises(ConversionError, match="nested more than 100 deep"):
        read_config(tmp_path)
