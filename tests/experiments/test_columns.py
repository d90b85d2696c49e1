"""Formats of tables, against chats and texts written by hand."""

import json

import pytest

from experiments.data import DataConfig, load_token_data
from tests.experiments.test_answers import targets
from tests.tiny import CHATML, make_tokenizer

TURNS = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Farewell.")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SHARED = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True, template=CHATML)


@pytest.fixture(scope="module")
def plain_tokenizer():
    return make_tokenizer(begin=True)


def read(tokenizer, folder, rows, **changes):
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval_rows": 0, "packing": False, "sequence_length": 400} | changes
    data = load_token_data(DataConfig(path=str(path), **settings), tokenizer)
    ids = [
        tokens[kept > 0]
        for tokens, kept in zip(data.train.tokens, data.train.segment_ids, strict=True)
    ]
    return data.format, [tokenizer.decode(each) for each in ids]


def rendered(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"conversations": [{"from": SHARED[r], "value": c} for r, c in TURNS]}, "sharegpt"),
        ({"conversations": MESSAGES}, "sharegpt"),
        ({"conversations": json.dumps(MESSAGES)}, "sharegpt"),
        ({"messages": MESSAGES, "text": "written out"}, "chat"),
        ({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, "prompt-completion"),
    ],
    ids=["sharegpt", "roles", "json text", "chat", "prompt"],
)
def test_conversations_of_every_form_are_the_same_chat(tokenizer, tmp_path, row, found):
    assert read(tokenizer, tmp_path, [row]) == (found, [rendered(tokenizer, MESSAGES)])
    answers = ["Hello.</s>\n", "Farewell.</s>\n"]
    expected = answers[1:] if "prompt" in row else answers
    assert targets(tokenizer, tmp_path, row) == expected


def test_sharegpt_has_systems_tools_and_calls(tmp_path):
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ (m.tool_calls or []) | tojson }}"
    )
    tokenizer = make_tokenizer(begin=False, template="{{ tools | tojson }}\n" + template)
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [
        *(("human", "1 + 2?"), ("function_call", json.dumps(call)), ("observation", "3")),
        ("gpt", "It is 3."),
    ]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    row |= {"system": "Be brief.", "tools": json.dumps(tools)}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert read(tokenizer, tmp_path, [row])[1] == [rendered(tokenizer, messages, tools=tools)]
    assert [piece[:9] for piece in targets(tokenizer, tmp_path, row)] == ['[{"type":', "It is 3.["]


def test_prompts_and_questions_in_plain_text(tokenizer, plain_tokenizer, tmp_path):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert read(plain_tokenizer, tmp_path, [row]) == ("prompt-completion", ["<s>2 + 2 = 4</s>"])
    assert targets(plain_tokenizer, tmp_path, row) == [" 4</s>"]
    row = {"question": "2 + {2}?", "answer": "{4}"}
    expected = ["<s>Question: 2 + {2}?\nAnswer: {4}</s>"]
    assert read(plain_tokenizer, tmp_path, [row]) == ("question-answer", expected)
    assert targets(plain_tokenizer, tmp_path, row) == [" {4}</s>"]
    chat = [{"role": "user", "content": "2 + {2}?"}, {"role": "assistant", "content": "{4}"}]
    assert read(tokenizer, tmp_path, [row]) == ("question-answer", [rendered(tokenizer, chat)])


def test_columns_may_have_other_names(plain_tokenizer, tmp_path):
    row = {"question": "2 + 2 =", "answer": " 4", "prompt": "other", "text": "more"}
    columns = ("prompt=question", "completion=answer")
    found = read(plain_tokenizer, tmp_path, [row], columns=columns)
    assert found == ("prompt-completion", ["<s>2 + 2 = 4</s>"])
    row = {"body": "some text"}
    assert read(plain_tokenizer, tmp_path, [row], columns=("text=body",))[0] == "text"


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        (
            {"a": 1, "b": 2},
            {},
            "has the columns a, b; expected messages .format chat., or .*--data.columns",
        ),
        (
            {"messages": MESSAGES, "prompt": "a", "completion": "b"},
            {},
            "columns messages, prompt, completion, which fit the formats chat and "
            "prompt-completion: choose with --data.format chat",
        ),
        ({"a": 1}, {"columns": ("prompt=q",)}, "has the columns a, but --data.columns names q"),
        (
            {"conversations": [{"from": "bard", "value": "a"}]},
            {},
            "row 1: from must be one of system",
        ),
        ({"conversations": [5]}, {}, "row 1: every message needs from and value, got 5"),
        ({"conversations": [{"from": "gpt", "value": 5}]}, {}, "row 1: content must be text"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, {}, "row 1: the value of a"),
        ({"prompt": MESSAGES, "completion": "b"}, {}, "row 1: completion must be a list"),
        ({"prompt": "a", "completion": MESSAGES}, {}, "row 1: completion must be text, got list"),
        ({"question": "a", "answer": 5}, {}, "row 1: answer must be text, got 5"),
    ],
    ids=["unknown", "several", "absent", "role", "number", "value", "call", "mixed", "list", "int"],
)
def test_what_does_not_fit_is_one_line(tokenizer, tmp_path, row, changes, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        read(tokenizer, tmp_path, [row], **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", ["prompt", "prompt=", "=a", "id=a"])
def test_columns_are_pairs(pair):
    with pytest.raises(ValueError, match="columns must be pairs such as prompt=question"):
        DataConfig(columns=(pair,))
    with pytest.raises(ValueError, match="columns must be pairs"):
        DataConfig(columns=("prompt=a", "prompt=b"))


def test_refusals_count_answers_not_messages(tmp_path):
    template = CHATML.replace("m['content'] }}", "m['content'] | replace('r', 'R') }}")
    tokenizer = make_tokenizer(begin=False, template=template + "{{ messages | length }}")
    with pytest.raises(ValueError, match="so that answer 2 cannot be found"):
        read(tokenizer, tmp_path, [{"messages": MESSAGES}])
