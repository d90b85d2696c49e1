"""The tokenizer of an adapter's directory, against the one of its base model."""

import json

import pytest

from convert import export_pretrained, load_pretrained, load_tokenizer
from tests.convert.checkpoints import LLAMA, write_directory
from tests.tiny import make_tokenizer
from tptt_jax import LoraConfig


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True, template="base {{ messages[0].content }}")


@pytest.fixture
def base(tmp_path, tokenizer):
    path = write_directory(tmp_path / "base", LLAMA)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path, base):
    model = load_pretrained(base, lora=LoraConfig(rank=2, targets=("q_proj",)))
    model.stacks[0].self_attn.q_proj.lora.b[...] += 1.0
    export_pretrained(model, tmp_path / "adapter", "peft", base)
    return tmp_path / "adapter"


def write_own(adapter):
    own = make_tokenizer(begin=True, template="own {{ messages[0].content }}")
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    own.save_pretrained(adapter)
    return own


def chat(tokenizer):
    return tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_complete_tokenizer_is_used(adapter, base, tmp_path, capsys):
    own = write_own(adapter)
    found = load_tokenizer(adapter)
    said = capsys.readouterr().err
    assert said.startswith("using the tokenizer of the adapter")
    assert said.count("\n") == 1
    assert chat(found) == "own x"
    assert found("a<|tool|>b").input_ids == own("a<|tool|>b").input_ids
    assert found.convert_tokens_to_ids("<|tool|>") == 500
    # It goes with an export of the whole model as well.
    export_pretrained(load_pretrained(adapter), tmp_path / "merged", "merged", adapter)
    assert chat(load_tokenizer(tmp_path / "merged")) == "own x"
    assert chat(load_tokenizer(base)) == "base x"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "vocab.json"])
def test_parts_of_a_tokenizer_are_said_to_be_passed_over(adapter, capsys, name):
    (adapter / name).write_text(json.dumps({"chat_template": "own"}))
    assert chat(load_tokenizer(adapter)) == "base x"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("using the tokenizer of the base model")
    assert name in said


def test_without_tokenizer_files_nothing_is_said(adapter, capsys):
    assert chat(load_tokenizer(adapter)) == "base x"
    assert capsys.readouterr().err == ""
