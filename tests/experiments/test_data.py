import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from experiments.data import DataConfig, TokenBatchSource, load_token_data, python_docs_text
from experiments.data.formats import alpaca_prompt
from experiments.data.packing import Example, pack_examples
from tests.tiny import BOS, CHATML, EOS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(begin=True)


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(begin=False, template=CHATML)


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def segments(source: TokenBatchSource) -> list[tuple[list[int], list[bool]]]:
    """Tokens and mask of every example, in the order of the rows."""
    found = []
    for tokens, ids, mask in zip(source.tokens, source.segment_ids, source.loss_mask, strict=True):
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            found.append((tokens[here].tolist(), mask[here].tolist()))
    return found


def targets_text(tokenizer: PreTrainedTokenizerFast, source: TokenBatchSource) -> list[str]:
    return [
        tokenizer.decode([token for token, target in zip(tokens, mask, strict=True) if target])
        for tokens, mask in segments(source)
    ]


ALPACA = [
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "2 + 3 = 5"},
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": "Name {a} colour.", "output": "{blue}"},
    {"instruction": "Break lines.", "input": None, "output": "\n\none\n\ntwo"},
]


# --- the demo text ---------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [True, False], ids=["bos", "no_bos"])
def test_demo_text_is_cut_without_losing_a_token(begin):
    tokenizer = make_tokenizer(begin=begin)
    data = load_token_data(DataConfig(sequence_length=100, eval_tokens=700), tokenizer)
    prefix = [BOS] if begin else []

    def body(source):
        pieces = [tokens for tokens, _ in segments(source)]
        assert all(piece[: len(prefix)] == prefix for piece in pieces)
        return [token for piece in pieces for token in piece[len(prefix) :]]

    whole = tokenizer(python_docs_text(), add_special_tokens=False)["input_ids"] + [EOS]
    assert data.eval is not None
    assert body(data.eval) == whole[:700]
    assert body(data.train) == whole[700:]
    # Everything but the first token of a row, which nothing predicts, is a target.
    expected = (data.train.segment_ids > 0) & (np.arange(100) > 0)
    np.testing.assert_array_equal(data.train.loss_mask, expected)
    assert (data.num_truncated, data.num_without_targets, data.num_documents) == (0, 0, 1)


def test_default_configuration_is_the_demo(tokenizer):
    data = load_token_data(DataConfig(), tokenizer)
    assert data.eval is not None
    assert data.eval.num_targets == 2000
    assert data.train.tokens.dtype == data.train.segment_ids.dtype == np.int32
    assert data.train.loss_mask.dtype == np.bool_
    assert data.describe().startswith("1 document (text): ")


def test_demo_rows_read_as_the_text_with_gemmas_tokenizer(demo_model_path):
    from convert import load_tokenizer

    tokenizer = load_tokenizer(str(demo_model_path))
    data = load_token_data(DataConfig(), tokenizer)
    assert data.eval is not None
    first = data.eval.tokens[0]
    assert first[0] == tokenizer.bos_token_id
    assert python_docs_text().startswith(tokenizer.decode(first[1:]))


# --- Alpaca ----------------------------------------------------------------------------------


def test_only_answers_count(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ALPACA)
    config = DataConfig(path=path, sequence_length=300, eval_rows=0, packing=False)
    data = load_token_data(config, tokenizer)
    assert data.format == "alpaca"
    assert data.eval is None
    assert targets_text(tokenizer, data.train) == [row["output"] + "</s>" for row in ALPACA]
    for row, (tokens, _) in zip(ALPACA, segments(data.train), strict=True):
        prompt = alpaca_prompt(row["instruction"], row.get("input") or "")
        assert tokenizer.decode(tokens) == f"<s>{prompt}{row['output']}</s>"
        assert ("### Input:\n" in prompt) == bool(row.get("input"))


def test_prompts_count_too_if_asked(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ALPACA)
    config = DataConfig(path=path, sequence_length=300, eval_rows=0, loss="all")
    data = load_token_data(config, tokenizer)
    assert all(mask == [False] + [True] * (len(mask) - 1) for _, mask in segments(data.train))


def test_long_examples_are_cut_off_and_counted(tokenizer, tmp_path):
    short = {"instruction": "a", "output": "b"}
    long_answer = {"instruction": "a", "output": "word " * 500}
    long_prompt = {"instruction": "word " * 500, "output": "lost"}
    path = write_lines(tmp_path / "a.jsonl", [short, long_answer, long_prompt])
    config = DataConfig(path=path, sequence_length=128, eval_rows=0, packing=False)
    data = load_token_data(config, tokenizer)
    assert (data.num_truncated, data.num_without_targets) == (2, 1)
    assert [len(tokens) for tokens, _ in segments(data.train)][1] == 128
    assert data.train.num_rows == 2
    assert "2 examples truncated, 1 left out" in data.describe()


def test_answers_that_are_all_cut_off_are_an_error(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ALPACA)
    config = DataConfig(path=path, sequence_length=10, eval_rows=0)
    with pytest.raises(ValueError, match=r"No example of .* raise --data\.sequence-length"):
        load_token_data(config, tokenizer)


def test_cutting_every_example_is_an_error_that_says_the_length_needed(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "a", "output": "word " * 500}])
    data = load_token_data(DataConfig(path=path, sequence_length=4096, eval_rows=0), tokenizer)
    needed = data.train.num_tokens
    with pytest.raises(ValueError, match=f"longer than sequence_length = 200: .* to {needed} "):
        load_token_data(DataConfig(path=path, sequence_length=200, eval_rows=0), tokenizer)


def test_real_alpaca_rows_are_all_there(tokenizer, shared_dir):
    path = shared_dir / "data" / "alpaca_cleaned_2000.jsonl"
    config = DataConfig(path=str(path), max_rows=300, sequence_length=2048, eval_rows=30)
    data = load_token_data(config, tokenizer)
    assert data.eval is not None
    assert data.num_truncated == data.num_without_targets == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()[:300]]
    answers = targets_text(tokenizer, data.train) + targets_text(tokenizer, data.eval)
    assert sorted(answers) == sorted(row["output"] + "</s>" for row in rows)
    assert len(segments(data.eval)) == 30
    # Packing fills the rows.
    assert data.train.num_tokens / data.train.tokens.size > 0.9


# --- conversations ---------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell, friend."},
]


def test_only_assistant_turns_count(chat_tokenizer, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    config = DataConfig(path=path, eval_rows=0, packing=False)
    data = load_token_data(config, chat_tokenizer)
    assert data.format == "chat"
    first, second = targets_text(chat_tokenizer, data.train)
    assert first == "Hello.</s>\nFarewell, friend.</s>\n"
    assert second == "Hello.</s>\n"
    tokens, _ = segments(data.train)[0]
    assert tokens == chat_tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]


def test_keys_that_only_other_messages_have_are_not_shown_to_the_template(tmp_path):
    template = "{% for m in messages %}{{ m.keys() | list | join(',') }}{% endfor %}"
    tokenizer = make_tokenizer(begin=False, template=template)
    rows = [{"messages": [CHAT[1]]}, {"messages": [CHAT[1] | {"name": "Ann"}]}]
    config = DataConfig(
        path=write_lines(tmp_path / "c.jsonl", rows), eval_rows=0, loss="all", packing=False
    )
    data = load_token_data(config, tokenizer)
    texts = [tokenizer.decode(tokens) for tokens, _ in segments(data.train)]
    assert texts == ["role,content", "role,content,name"]


def test_a_template_that_writes_other_answers_is_refused(tmp_path):
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    template = template.replace("{% endfor %}", "{% endfor %}{{ messages | length }}")
    tokenizer = make_tokenizer(begin=False, template=template)
    path = write_lines(tmp_path / "c.jsonl", [{"messages": CHAT[1:]}])
    expected = r"row 1: the chat template rewrites earlier turns, so that answer 1 cannot"
    with pytest.raises(ValueError, match=expected):
        load_token_data(DataConfig(path=path, eval_rows=0), tokenizer)
    assert load_token_data(DataConfig(path=path, eval_rows=0, loss="all"), tokenizer)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "holds conversations, but the tokenizer of this model has no chat"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, r"row 1: roles must alternate"),
        (CHATML, [], "messages must be a list"),
        (CHATML, [{"role": "user"}], "every message needs role and content"),
        (CHATML, CHAT[:2], "no answer that counts in the loss: expected text in messages"),
        (CHATML, [{"role": "gpt", "content": "a"}], r'of the role "assistant"'),
        (CHATML, [m | {"weight": 0} for m in CHAT], "no answer that counts in the loss"),
    ],
    ids=["no_template", "refused", "empty", "no_content", "no_answer", "other_role", "untrained"],
)
def test_bad_conversations_are_named(tmp_path, template, messages, message):
    path = write_lines(tmp_path / "c.jsonl", [{"messages": messages}])
    tokenizer = make_tokenizer(begin=False, template=template)
    with pytest.raises(ValueError, match=message):
        load_token_data(DataConfig(path=path, format="chat", eval_rows=0), tokenizer)


TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m['role'] }}:"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def _tool_row(name: str, arguments: dict[str, str]) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    described = {"name": name, "parameters": {"type": "object", "default": None}}
    return {
        "tools": [{"type": "function", "function": described}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "On "}, {"text": "2024-05-01"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2024-05-02"},
            {"role": "assistant", "content": "2024-05-03"},
        ],
    }


TOOL_ROWS = [_tool_row("weather", {"city": "Paris"}), _tool_row("clock", {"tz": "1", "utc": "2"})]


def _texts(tokenizer, config: DataConfig) -> list[str]:
    data = load_token_data(config, tokenizer)
    return [tokenizer.decode(tokens) for tokens, _ in segments(data.train)]


@pytest.mark.parametrize("kind", ["jsonl", "array", "json text", "functions", "parquet"])
def test_tools_and_parts_reach_the_template_as_written(tmp_path, kind):
    tokenizer = make_tokenizer(begin=False, template=TOOLS)
    path = tmp_path / {"array": "t.json", "parquet": "t.parquet"}.get(kind, "t.jsonl")
    rows = TOOL_ROWS
    if kind == "json text":
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    if kind == "functions":  # OpenAI's older name
        described = [[tool["function"] for tool in row["tools"]] for row in rows]
        rows = [
            {"messages": row["messages"], "functions": functions}
            for row, functions in zip(rows, described, strict=True)
        ]
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        first = {"role": "user", "content": "On 2024-05-01"}  # a column has one type
        rows = [row | {"messages": [first, *row["messages"][1:]]} for row in rows]
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "array":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, rows)
    config = DataConfig(path=str(path), eval_rows=0, packing=False, sequence_length=512)
    expected = []
    for row in TOOL_ROWS:
        plain = [dict(message) for message in row["messages"]]
        plain[0]["content"], plain[1]["content"] = "On 2024-05-01", ""
        tools = row["tools"]
        if kind == "parquet":  # which has no keys of its own for every row: a null is none
            function = {"name": tools[0]["function"]["name"], "parameters": {"type": "object"}}
            tools = [{"type": "function", "function": function}]
        expected.append(tokenizer.apply_chat_template(plain, tools=tools, tokenize=False))
    assert _texts(tokenizer, config) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "a part of type 'image_url'"),
        ({"content": {"text": "a"}}, "content must be text or a list of text parts"),
        ({"content": 5}, "content must be text or a list of text parts, got 5"),
        ({"content": None}, "every message needs role and content"),
        ({"content": "a", "weight": 2}, "weight of a message must be 0 or 1, got 2"),
    ],
    ids=["image", "object", "number", "null", "weight"],
)
def test_contents_that_are_no_text_are_refused(chat_tokenizer, tmp_path, message, expected):
    rows = [{"messages": CHAT}, {"messages": [CHAT[1], {"role": "assistant"} | message]}]
    path = write_lines(tmp_path / "c.jsonl", rows)
    with pytest.raises(ValueError, match=expected) as caught:
        load_token_data(DataConfig(path=path, eval_rows=0), chat_tokenizer)
    assert str(caught.value).startswith(f"{path}, row 2: ")


@pytest.mark.parametrize("tools", [5, ["f"], "{"], ids=repr)
def test_tools_that_are_none_are_refused(chat_tokenizer, tmp_path, tools):
    path = write_lines(tmp_path / "c.jsonl", [{"messages": CHAT, "tools": tools}])
    with pytest.raises(ValueError, match="row 1: tools must be a list"):
        load_token_data(DataConfig(path=path, eval_rows=0), chat_tokenizer)


@pytest.mark.parametrize("loss", ["answers", "all"])
def test_answers_of_weight_0_are_not_trained_on(chat_tokenizer, tmp_path, loss):
    weighted = [*CHAT[:2], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4] | {"weight": 1}]
    path = write_lines(tmp_path / "c.jsonl", [{"messages": weighted}])
    config = DataConfig(path=path, eval_rows=0, packing=False, loss=loss)
    data = load_token_data(config, chat_tokenizer)
    (text,) = targets_text(chat_tokenizer, data.train)
    assert "Hello." not in text
    assert text.endswith("Farewell, friend.</s>\n")
    assert ("Bye" in text) == (loss == "all")
    ((tokens, _),) = segments(data.train)
    assert tokens == chat_tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]


@pytest.mark.parametrize("begin", [True, False], ids=["adds bos", "adds none"])
def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path, begin):
    tokenizer = make_tokenizer(begin=begin, template="<s><s>" + CHATML)
    path = write_lines(tmp_path / "t.jsonl", [{"text": "<s>rendered"}, {"text": "<s><s>twice"}])
    config = DataConfig(path=path, eval_rows=0, packing=False)
    assert _texts(tokenizer, config) == ["<s>rendered</s>", "<s>twice</s>"]
    chat = [{"role": "assistant", "content": "a"}]
    path = write_lines(tmp_path / "c.jsonl", [{"messages": chat}])
    (text,) = _texts(tokenizer, DataConfig(path=path, eval_rows=0))
    assert text.count("<s>") == 1


# --- text and files --------------------------------------------------------------------------

TEXTS = ["First text.", "NA", "007", 'A "third", with commas.\nAnd a line.']


def _write_table(path: Path, texts: list[str]) -> str:
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = pa.table({"text": texts, "other": ["x"] * len(texts)})
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".tsv":
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t"))
    elif path.name == "array.json":
        path.write_text(json.dumps(table.to_pylist(), indent=1))
    else:
        write_lines(path, table.to_pylist())
    return str(path)


@pytest.mark.parametrize(
    "name", ["t.jsonl", "array.json", "lines.json", "t.csv", "t.tsv", "t.parquet", "odd[1].JSONL"]
)
def test_every_kind_of_file_gives_its_texts(tokenizer, tmp_path, name):
    path = _write_table(tmp_path / name, TEXTS)
    before = sorted(tmp_path.rglob("*"))
    data = load_token_data(DataConfig(path=path, eval_rows=0, packing=False), tokenizer)
    texts = [tokenizer.decode(tokens) for tokens, _ in segments(data.train)]
    assert texts == [f"<s>{text}</s>" for text in TEXTS]
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_that_look_like_something_else_stay_texts(tokenizer, tmp_path):
    texts = ["2024-05-01", "2024-05-01T10:00:00", "12", "1e5", "true", "null", "2024-05-02"]
    for name in ("t.jsonl", "array.json", "t.csv"):
        path = _write_table(tmp_path / name, texts)
        config = DataConfig(path=path, eval_rows=0, packing=False)
        assert _texts(tokenizer, config) == [f"<s>{text}</s>" for text in texts]


def test_columns_may_appear_and_change_at_any_row(tokenizer, tmp_path):
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": "x"}, {"text": "three", "more": [1]}]
    path = write_lines(tmp_path / "t.jsonl", rows)
    config = DataConfig(path=path, eval_rows=0, packing=False)
    assert _texts(tokenizer, config) == ["<s>one</s>", "<s>two</s>", "<s>three</s>"]
    path = write_lines(tmp_path / "u.jsonl", [*rows, {"id": 4}])
    with pytest.raises(ValueError, match="row 4: text must be text, got nothing"):
        load_token_data(DataConfig(path=path, eval_rows=0), tokenizer)


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    file = tmp_path / "book.txt"
    text = "Chapter one.\n\n" + "And so on. " * 50 + "\n\nThe end.\n"
    file.write_text(text)
    config = DataConfig(path=str(file), eval_tokens=20, sequence_length=32)
    data = load_token_data(config, tokenizer)
    assert data.eval is not None
    pieces = [tokens[1:] for source in (data.eval, data.train) for tokens, _ in segments(source)]
    assert tokenizer.decode([token for piece in pieces for token in piece]) == text + "</s>"


def test_texts_of_a_named_column_win_over_other_formats(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ALPACA[1], ALPACA[1]])
    config = DataConfig(path=path, text_column="output", eval_rows=0)
    data = load_token_data(config, tokenizer)
    assert data.format == "text"
    assert [tokenizer.decode(t) for t, _ in segments(data.train)] == ["<s>Hello!</s>"] * 2


def test_empty_texts_are_counted(tokenizer, tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": ""}, {"text": "one"}])
    data = load_token_data(DataConfig(path=path, eval_rows=0), tokenizer)
    assert (data.train.num_rows, data.num_without_targets) == (1, 1)


@pytest.mark.parametrize(("eval_rows", "count"), [(0.0, 0), (0.25, 10), (0.001, 1), (7.0, 7)])
def test_held_out_rows_are_a_share_or_a_count(tokenizer, tmp_path, eval_rows, count):
    texts = [f"text {number:02}" for number in range(40)]
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    config = DataConfig(path=path, eval_rows=eval_rows)
    data = load_token_data(config, tokenizer, seed=3)

    def read(source):
        return [] if source is None else [tokenizer.decode(t[1:-1]) for t, _ in segments(source)]

    assert len(read(data.eval)) == count
    assert sorted(read(data.train) + read(data.eval)) == texts
    assert read(load_token_data(config, tokenizer, seed=3).eval) == read(data.eval)
    if count in (7, 10):
        assert read(load_token_data(config, tokenizer, seed=4).eval) != read(data.eval)


def test_max_rows_and_split_slices_take_the_first_rows(tokenizer, tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(10)])
    limited = load_token_data(DataConfig(path=path, max_rows=4, eval_rows=0), tokenizer)
    sliced = load_token_data(DataConfig(path=path, split="train[:4]", eval_rows=0), tokenizer)
    np.testing.assert_array_equal(limited.train.tokens, sliced.train.tokens)
    assert len(segments(limited.train)) == 4


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "Cannot read|no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\n', r"line 2, is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2, must be a JSON object, got list"),
        ("a.json", '[{"text": "a"},\n {"text": ]', r"line 2, is not valid JSON"),
        ("a.json", '[{"text": "a"}, 5]', r"element 2, must be a JSON object, got int"),
        ("a.json", "[]", "Cannot read|no rows"),
        ("a.csv", "text,other\na,b\nc\n", r"line 3, has 1 cells where the header has 2"),
        ("a.csv", "text\n", "Cannot read|no rows"),
        ("a.parquet", "PAR1", "Cannot read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2, is not UTF-8"),
        ("a.txt", b"\xff\xfe\xfa", "line 1, is not UTF-16-LE text"),
        ("a.xyz", "short", "eval_tokens = 2000 are held out"),
        ("a.xyz", b"PK\xff", r"line 1, is not UTF-8 text"),
        ("a.jsonl", '{"ask": "a", "answer": "b"}\n', "has the columns ask, answer; exp"),
        ("a.jsonl", '{"text": 5}\n{"text": 6}\n', "row 1: text must be text, got int"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "row 2: text must be text, got nothing"),
        ("a.jsonl", '{"text": ""}\n{"text": ""}\n', "No example of"),
        ("a.txt", "short", "eval_tokens = 2000 are held out"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a.") else "",
)
def test_bad_files_are_named_in_one_sentence(tokenizer, tmp_path, name, content, message, capfd):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_token_data(DataConfig(path=str(file), eval_rows=0), tokenizer)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/file", "nobody/nothing"])
def test_missing_data_are_named(tokenizer, path):
    with pytest.raises(FileNotFoundError, match=path):
        load_token_data(DataConfig(path=path), tokenizer)


def test_an_unknown_split_is_named(tokenizer, tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"Cannot read .* Unknown split"):
        load_token_data(DataConfig(path=path, split="test"), tokenizer)


def test_holding_out_everything_is_an_error(tokenizer, tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"has 1 row and 1 would be held out"):
        load_token_data(DataConfig(path=path), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"eval_rows": 1.5}, "eval_rows must be a share"),
        ({"eval_rows": -1.0}, "eval_rows must be a share"),
        ({"format": "dpo"}, "format must be one of auto, text, alpaca, chat"),
        ({"loss": "some"}, "loss must be one of answers, all"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


# --- packing and batches ---------------------------------------------------------------------


def _examples(lengths: list[int]) -> list[Example]:
    """Examples whose tokens are all different, so that each can be found again."""
    starts = np.cumsum([1, *lengths])
    return [
        Example(np.arange(start, start + n, dtype=np.int32), np.arange(n) > n // 2)
        for start, n in zip(starts, lengths, strict=False)
    ]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=60), packing=st.booleans())
def test_every_example_is_in_one_row_in_one_piece(lengths, packing):
    examples = _examples(lengths)
    source = pack_examples(examples, 17, packing=packing)
    found = segments(source)
    assert sorted(found) == sorted((e.tokens.tolist(), e.targets.tolist()) for e in examples)
    padding = source.segment_ids == 0
    assert not source.loss_mask[padding].any()
    assert not source.tokens[padding].any()
    # Segments are in order and padding comes last.
    steps = np.diff(np.where(padding, 10_000, source.segment_ids), axis=1)
    assert (steps >= 0).all()
    if packing:
        # No two rows would fit into one.
        free = np.sort(17 - (~padding).sum(axis=1))[::-1]
        assert len(free) < 2 or free[0] + free[1] < 17
    else:
        assert source.num_rows == len(lengths)


def _numbered_rows(count: int) -> TokenBatchSource:
    return pack_examples(_examples([4] * count), 4, packing=False)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16], ids="batch{}".format)
def test_epochs_wrap_over_without_dropping_a_row(batch_size):
    source = _numbered_rows(7)
    steps = 4 * 7
    seen = [
        int(row[0])
        for step in range(steps)
        for row in source.batch_at(step, batch_size, seed=5).tokens
    ]
    epochs = [seen[start : start + 7] for start in range(0, len(seen), 7)]
    assert all(sorted(epoch) == sorted(source.tokens[:, 0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_on_seed_and_step_only():
    source = _numbered_rows(50)
    first, again = source.batch_at(11, 4, seed=1), source.batch_at(11, 4, seed=1)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first.tokens, source.batch_at(12, 4, seed=1).tokens)
    assert not np.array_equal(first.tokens, source.batch_at(11, 4, seed=2).tokens)


def test_evaluation_sees_every_row_once_and_pads_the_last_batch():
    source = _numbered_rows(7)
    batches = list(source.batches(3))
    assert [batch.tokens.shape for batch in batches] == [(3, 4)] * 3
    np.testing.assert_array_equal(
        np.concatenate([batch.tokens for batch in batches])[:7], source.tokens
    )
    last = batches[-1]
    assert not last.segment_ids[1:].any()
    assert not last.loss_mask[1:].any()
    assert last.loss_mask.dtype == np.bool_
    assert last.tokens.dtype == np.int32


def test_held_out_rows_of_a_text_may_be_shorter(tokenizer):
    config = DataConfig(sequence_length=64, eval_tokens=400, eval_length=100)
    data = load_token_data(config, tokenizer)
    assert data.train.sequence_length == 64
    assert data.eval.sequence_length == 100
    assert data.eval.num_rows == 5  # one more for what begins every row
    with pytest.raises(ValueError, match="eval_length must be at least 2"):
        DataConfig(eval_length=1)
