"""Odd tokenizers have the ids and texts of `tokenizers` itself; test_fuzz has damaged ones."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from convert import load_tokenizer
from tests.convert.test_tokenizer_labels import byte_level, sentencepiece_like, unigram
from tests.generated import examples

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(["hello world is a test", "don't say 12345 caf\u00e9"], trainer)
    return tokenizer


def plain_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(["hello world is a test", "don't say 12345"], trainer)
    return tokenizer


KINDS = {
    "byte-level": byte_level(),
    "sentencepiece": sentencepiece_like(),
    "unigram": unigram(),
    "word piece": word_piece(),
    "bpe": plain_bpe(),
}
FILES = {name: tokenizer.to_str() for name, tokenizer in KINDS.items()}

pieces = st.sampled_from(
    [
        *("", " ", "  ", "\n", "\r\n", "\t\u00a0", "\u2028", "\x00", "\ufeff", "e\u0301", "🜚"),
        *("<|im_start|>", "<|im_end|>", "<|tool|>", "<|endoftext|>", "<unk>", "[x]", "\u2581"),
        *(
            "hello",
            " world",
            "Hello.",
            "12345",
            "2024-05-01",
            "x" * 50,
            "\u202e",
            "\ufb01",
            "don't",
        ),
        *("\u4e2d\u6587", "<0x41>", "##ing", " .", " n't", "\u0627\u0644"),
    ]
)
texts = st.lists(pieces | st.text(st.characters(codec="utf-8"), max_size=6), max_size=5).map(
    "".join
)
BEGINNINGS: list[Any] = [
    None,
    {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [1], "tokens": ["<|endoftext|>"]}
        },
    },
]
NORMALIZERS: list[Any] = [None, {"type": "NFC"}, {"type": "Lowercase"}]


@st.composite
def tokenizer_files(draw):
    """tokenizer.json of one kind, with a beginning, tokens added later, and other normalizers."""
    content = json.loads(FILES[draw(st.sampled_from(list(FILES)))])
    content["post_processor"] = draw(st.sampled_from(BEGINNINGS))
    if content["normalizer"] is None:
        content["normalizer"] = draw(st.sampled_from(NORMALIZERS))
    last = max(
        *(token["id"] for token in content["added_tokens"]), len(content["model"]["vocab"]) - 1
    )
    names = draw(st.lists(st.sampled_from(["<|tool|>", "[x]", "hello", " world"]), unique=True))
    known = {token["content"] for token in content["added_tokens"]}
    for number, name in enumerate((each for each in names if each not in known), start=last + 1):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        token = {flag: draw(st.booleans()) for flag in flags}
        content["added_tokens"].append({"id": number, "content": name} | token)
    return content


labels = st.fixed_dictionaries(
    {"eos_token": st.just("<|im_end|>")},
    optional={
        "bos_token": st.just("<|endoftext|>"),
        "unk_token": st.just("<unk>"),
        "tokenizer_class": st.sampled_from(
            ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend"]
        ),
        "clean_up_tokenization_spaces": st.just(False),
    },
)


def write(folder, content, label, model_type):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(label))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def check(file: Tokenizer, ours, text: str) -> None:
    for special in (False, True):
        wanted = file.encode(text, add_special_tokens=special).ids
        assert ours(text, add_special_tokens=special)["input_ids"] == wanted
        decoded = file.decode(wanted, skip_special_tokens=False)
        assert ours.decode(wanted, clean_up_tokenization_spaces=False) == decoded


@examples(50)
@given(
    content=tokenizer_files(),
    label=labels,
    model_type=st.sampled_from(["llama", "qwen2", "gpt2", "mistral"]),
    found=st.lists(texts, min_size=1, max_size=4),
)
def test_odd_tokenizers_have_the_ids_of_their_file(tmp_path, content, label, model_type, found):
    write(tmp_path, content, label, model_type)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in found:
        check(file, ours, text)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Every kind, without and with a beginning: the file's own tokenizer, and what we load."""
    pairs = []
    for text in FILES.values():
        for beginning in BEGINNINGS:
            content = json.loads(text) | {"post_processor": beginning}
            label = {"bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
            folder = write(tmp_path_factory.mktemp("tokenizer"), content, label, "llama")
            file = Tokenizer.from_file(str(folder / "tokenizer.json"))
            pairs.append((file, load_tokenizer(folder)))
    return pairs


@examples(300)
@given(text=texts)
def test_texts_have_the_ids_of_the_file(loaded, text):
    for file, ours in loaded:
        check(file, ours, text)


@examples(200)
@given(text=texts)
def test_byte_level_gives_every_text_back(loaded, text):
    _, ours = loaded[0]
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids, clean_up_tokenization_spaces=False) == text
