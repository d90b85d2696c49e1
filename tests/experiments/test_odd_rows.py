"""Hostile and odd rows: refused in one line, or read exactly."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import DataConfig, load_token_data
from experiments.data.formats import alpaca_prompt
from experiments.data.templates import ChatTemplate
from tests.experiments.test_answers import LATE_SYSTEM, MARKED, QWEN3, THINKING
from tests.generated import examples
from tests.tiny import CHATML, make_tokenizer

LENGTH = 6000
TEMPLATES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "r1": THINKING,
    "marked": MARKED,
    "late": LATE_SYSTEM,
    "fragile": "{{ messages[1]['content'][0] + messages[0]['role'] }}" + CHATML,
}
TOKENIZERS = {
    name: make_tokenizer(begin=True, template=template) for name, template in TEMPLATES.items()
}
PLAIN = make_tokenizer(begin=True)


pieces = st.sampled_from(
    [
        *("", " ", "\n", "\t\u00a0", "\u2028", "\r\n", "\x00", "\x85", "<s>", "</s>", "<|turn|>"),
        *("<think>", "</think>", "{{ 1 / 0 }}", "{x}", "%s", "a", "Hello.", "2024-05-01", "007"),
        *("\ud800", "e\u0301", "\ufeff", "\ue000", "🜚", "null", "[]", "x" * 300, "\u202e"),
    ]
)
texts = st.lists(pieces | st.text(max_size=5), max_size=4).map("".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=3,
)
roles = st.sampled_from(["user", "assistant", "system", "tool"])
fine_messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": texts}, optional={"weight": st.sampled_from([0, 1])}
    ),
    min_size=1,
    max_size=5,
)
odd_messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles | values},
        optional={
            "content": values,
            "tool_calls": values,
            "weight": values,
            "name": values,
            "from": st.sampled_from(["human", "gpt", "function_call"]) | values,
            "value": values,
        },
    )
    | values,
    max_size=4,
)
FORMATS = (
    *(("text",), ("instruction", "input", "output"), ("prompt", "completion")),
    *(("question", "answer"), ("messages", "tools"), ("conversations", "tools", "system")),
    *(("messages",), ("conversations",), ("prompt", "completion", "text"), ("\n", "id")),
)
cells = values | odd_messages | fine_messages | texts


@st.composite
def odd_tables(draw):
    """Rows of one format or of none, with cells of any kind."""
    names = draw(st.sampled_from(FORMATS))
    row = st.fixed_dictionaries({}, optional=dict.fromkeys(names, cells))
    return draw(st.lists(row, min_size=1, max_size=2))


def read(folder: Path, rows: list, tokenizer, **changes):
    """What is read of JSON Lines; None: it is refused in one line."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"eval_rows": 0, "packing": False, "sequence_length": LENGTH} | changes
    try:
        return load_token_data(DataConfig(path=str(path), **config), tokenizer)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert str(path) in message
    return None


def tokens_of(data) -> list[list[int]]:
    return [
        tokens[kept > 0].tolist()
        for tokens, kept in zip(data.train.tokens, data.train.segment_ids, strict=True)
    ]


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def begun_once(text: str) -> str:
    """A text as a tokenizer that begins texts gives it back."""
    while text.startswith("<s>"):
        text = text.removeprefix("<s>")
    return f"<s>{text}"


@examples(300)
@given(
    rows=odd_tables(),
    name=st.sampled_from([*TEMPLATES, None]),
    loss=st.sampled_from(["answers", "all"]),
)
def test_odd_rows_are_read_or_refused_in_one_line(tmp_path, rows, name, loss):
    read(tmp_path, rows, TOKENIZERS[name] if name else PLAIN, loss=loss)


@examples(150)
@given(found=st.lists(texts, min_size=1, max_size=3))
def test_texts_are_kept_to_the_letter(tmp_path, found):
    data = read(tmp_path, [{"text": text} for text in found], PLAIN)
    if data is None:
        assert not all(map(is_text, found)) or not any(begun_once(text)[3:] for text in found)
        return
    # What has nothing to predict is left out, and said.
    expected = [begun_once(text) for text in found if begun_once(text) != "<s>"]
    assert data.num_without_targets == len(found) - len(expected)
    ended = [text if text.endswith("</s>") else f"{text}</s>" for text in expected]
    assert [PLAIN.decode(tokens) for tokens in tokens_of(data)] == ended


@examples(100)
@given(instruction=texts, context=texts | st.none(), answer=texts)
def test_instructions_are_kept_to_the_letter(tmp_path, instruction, context, answer):
    row = {"instruction": instruction, "input": context, "output": answer}
    data = read(tmp_path, [row], PLAIN)
    text = alpaca_prompt(instruction, context or "") + answer
    if data is None:
        assert not is_text(text)
        return
    (tokens,) = tokens_of(data)
    ended = text if text.endswith("</s>") else f"{text}</s>"
    assert PLAIN.decode(tokens) == f"<s>{ended}"
    (mask,) = data.train.loss_mask
    counted = PLAIN.decode(data.train.tokens[0][mask])
    assert counted.endswith(answer if answer.endswith("</s>") else f"{answer}</s>")


@examples(150)
@given(messages=fine_messages, name=st.sampled_from(list(TEMPLATES)))
def test_chats_are_what_transformers_writes(tmp_path, messages, name):
    tokenizer = TOKENIZERS[name]
    data = read(tmp_path, [{"messages": messages}], tokenizer)
    if data is None:
        return
    plain = [{"role": each["role"], "content": each["content"]} for each in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    (tokens,) = tokens_of(data)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens == whole[len(whole) - len(tokens) :]
    assert set(whole[: len(whole) - len(tokens)]) <= {tokenizer.bos_token_id}
    assert not text.startswith("<s><s>") or tokenizer.decode(tokens) == begun_once(text)
    # Every answer that counts is among what counts, and nobody else's words.
    (mask,) = data.train.loss_mask
    counted = tokenizer.decode(data.train.tokens[0][mask])
    trained = [m for m in messages if m["role"] == "assistant" and m.get("weight") != 0]
    if name in ("chatml", "marked"):
        end = "</s>\n" if name == "chatml" else "</s>"
        assert counted == "".join(each["content"] + end for each in trained)
    for each in trained:
        assert each["content"].split("</think>")[-1].strip() in counted


def test_rows_of_every_format_that_can_be_read_are_read(tmp_path):
    """The generators above reach what is not refused."""
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\x00"}]},
        {
            "messages": [
                {"role": "user", "content": "{{ 1 / 0 }}"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"question": "%s", "answer": "{x}"},
        {"prompt": "\u2028", "completion": "\ufeff"},
    ]
    assert all(read(tmp_path, [row], TOKENIZERS["chatml"]) for row in rows)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_this_file_write_a_chat(name):
    assert ChatTemplate(TOKENIZERS[name]).render([{"role": "user", "content": "a"}] * 2)
