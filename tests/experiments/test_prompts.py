"""Texts and conversations as tokens."""

import os

import numpy as np
import pytest

from convert import load_tokenizer
from experiments.data import prompts
from experiments.data.prompts import chat_tokens, document_tokens, read_text, text_tokens
from experiments.generate import GenerateConfig, generate_text
from tests.tiny import BOS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True)


def all_tokens(*args, **kwargs):
    return np.concatenate(list(document_tokens(*args, **kwargs))).tolist()


@pytest.mark.parametrize("size", [50, 1000, 1 << 20])
def test_a_file_read_in_pieces_gives_the_tokens_of_the_whole(
    size, tokenizer, shared_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(prompts, "_CHARACTERS_AT_A_TIME", size)
    monkeypatch.setattr(prompts, "CALL_TOKENS", 100)
    text = (shared_dir / "data" / "moby_dick.txt").read_text(encoding="utf-8")[:20_000]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    assert "".join(read_text(path)) == text
    assert all_tokens(tokenizer, path) == tokenizer(text)["input_ids"]
    pieces = list(document_tokens(tokenizer, path, begin=False))
    assert {len(piece) for piece in pieces[:-1]} == {100}
    assert np.concatenate(pieces).tolist() == tokenizer(text)["input_ids"][1:]


def test_the_demo_s_tokenizer_may_be_fed_in_pieces(
    demo_model_path, shared_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(prompts, "_CHARACTERS_AT_A_TIME", 3000)
    tokenizer = load_tokenizer("demo")
    text = (shared_dir / "data" / "moby_dick.txt").read_text(encoding="utf-8")[:100_000]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    assert all_tokens(tokenizer, path) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", ["", "x", "\n\n\n", "no line ends here " * 20], ids=repr)
def test_odd_files(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "_CHARACTERS_AT_A_TIME", 7)
    path = tmp_path / "text.txt"
    path.write_text(text)
    got = [token for piece in document_tokens(tokenizer, path) for token in piece.tolist()]
    assert got == (tokenizer(text)["input_ids"] if text else [])


def test_what_is_not_text_is_refused(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(document_tokens(tokenizer, path))


def test_a_prompt_begins_only_at_the_beginning(tokenizer):
    assert text_tokens(tokenizer, "a b")[0] == BOS
    assert text_tokens(tokenizer, "a b", begin=False).tolist() == tokenizer("a b")["input_ids"][1:]


@pytest.mark.parametrize("text", ["a b", "<s>a b", "<s><s>a b"], ids=["no", "one", "two"])
def test_a_prompt_begins_once(tokenizer, tmp_path, text):
    expected = tokenizer("a b")["input_ids"]
    assert text_tokens(tokenizer, text).tolist() == expected
    assert text_tokens(tokenizer, text, begin=False).tolist() == expected[1:]
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert all_tokens(tokenizer, path) == expected
    bare = make_tokenizer(begin=False)
    begun = [BOS] if "<s>" in text else []
    assert all_tokens(bare, path) == begun + expected[1:]
    chat = make_tokenizer(begin=True, template="<s>{{ messages[0]['content'] }}")
    assert chat_tokens(chat, [{"role": "user", "content": text}]) == expected


def test_a_chat_begins_only_at_the_beginning():
    tokenizer = make_tokenizer(begin=True, template="<s>{{ messages[0]['content'] }}")
    messages = [{"role": "user", "content": "hi"}]
    tokens = chat_tokens(tokenizer, messages)
    assert tokens[0] == BOS
    assert chat_tokens(tokenizer, messages, begin=False) == tokens[1:]
    with pytest.raises(ValueError, match="chat template"):
        chat_tokens(make_tokenizer(begin=True), messages)


def test_a_prompt_file_is_checked_before_a_model_is_loaded(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, error, message in (
        ("pipe", ValueError, "pipe is a pipe, a device or a socket"),
        ("folder", ValueError, "folder is a directory"),
        ("missing", FileNotFoundError, "no such file: .*missing"),
    ):
        config = GenerateConfig(model="/nowhere", prompt_file=tmp_path / name)
        with pytest.raises(error, match=message):
            generate_text(config)
        with pytest.raises(error, match=message):
            next(read_text(tmp_path / name))
