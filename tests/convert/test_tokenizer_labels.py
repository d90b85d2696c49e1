"""Directories whose tokenizer.json does not fit the class that they name."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import Qwen2Tokenizer

from convert import ConversionError, load_tokenizer

CORPUS = [
    "hello world is a test",
    "def f(x):\n    return x + 1\n\n",
    "don't say 12345 caf\u00e9",
] * 9
TEXTS = (
    *("hello world is a test\ncaf\u00e9", "   three  blanks ", "a\n\n\nb\r\n\tc", "don't 12345"),
    *("e\u0301 \u4e2d\u6587 \U0001f600", "<|im_start|>hello<|im_end|> world<|endoftext|>x"),
)
SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SETTINGS = {
    **{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
    **{"chat_template": TEMPLATE, "model_max_length": 77, "padding_side": "left"},
}


def sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=pieces, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [*SPECIAL, "\u2581", *sorted(set("".join(CORPUS)))]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


KINDS = {"sentencepiece": sentencepiece_like, "byte-level": byte_level, "unigram": unigram}
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None)


def write(path, kind, model_type, tokenizer_class):
    path.mkdir()
    KINDS[kind]().save(str(path / "tokenizer.json"))
    label = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS | label))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_file(tmp_path, kind, model_type):
    for name in CLASSES:
        path = write(tmp_path / str(name), kind, model_type, name)
        file, ours = Tokenizer.from_file(str(path / "tokenizer.json")), load_tokenizer(path)
        for text in TEXTS:
            wanted = file.encode(text, add_special_tokens=False).ids
            assert ours(text, add_special_tokens=False)["input_ids"] == wanted, (name, text)
            assert ours(text)["input_ids"] == file.encode(text).ids, (name, text)
            assert ours.decode(wanted) == file.decode(wanted, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_go_along(tmp_path, kind):
    ours = load_tokenizer(write(tmp_path / "m", kind, "qwen2", "PreTrainedTokenizerFast"))
    assert (ours.bos_token, ours.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (ours.model_max_length, ours.padding_side) == (77, "left")
    chat = ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"


def test_a_class_that_agrees_is_kept(tmp_path):
    own = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert type(load_tokenizer(tmp_path)) is Qwen2Tokenizer


def test_truncation_in_the_file_is_no_difference(tmp_path):
    own = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    file.enable_truncation(2)
    file.save(str(tmp_path / "tokenizer.json"))
    assert type(load_tokenizer(tmp_path)) is Qwen2Tokenizer


def test_code_of_the_repository_stays_refused(tmp_path):
    path = write(tmp_path / "m", "byte-level", "llama", "MyTokenizer")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["mine.MyTokenizer", None]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="no tokenizer that can be read"):
        load_tokenizer(path)
